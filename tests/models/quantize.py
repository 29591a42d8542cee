"""A checkpoint quantized to block-wise float8, and its plain twin with the numbers it stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["QUANTIZATION", "is_quantized", "quantize_checkpoint", "quantized"]

QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

_LARGEST = 448.0  # of float8 e4m3


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    """The matrices of attention, experts and dense layers; not embeddings, heads, routers, norms and biases."""
    return tensor.dim() == 2 and name.endswith(("proj.weight", "proj_with_mqa.weight"))


def quantized(weight_OI: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its float8 numbers, its scales, and what they stand for, block by block."""
    outputs, inputs = weight_OI.shape
    scale_BC = torch.empty(-(-outputs // rows), -(-inputs // columns))
    stored_OI = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
    plain_OI = torch.empty(outputs, inputs)
    for row in range(scale_BC.shape[0]):
        for column in range(scale_BC.shape[1]):
            block = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            scale = weight_OI[block].float().abs().max() / _LARGEST
            scale_BC[row, column] = scale
            stored_OI[block] = (weight_OI[block].float() / scale).to(torch.float8_e4m3fn)
            plain_OI[block] = stored_OI[block].float() * scale
    return stored_OI, scale_BC, plain_OI


def quantize_checkpoint(source: Path, target: Path, *, plain: Path, block: tuple[int, int] = (128, 128)) -> int:
    """Write `source` quantized to `target`, and in float32 what it then stands for to `plain`.

    In both the scales and weights are in files of their own, as the index says. Returns how many were quantized.
    """
    for folder in (target, plain):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    stored = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    files: dict[str, dict[str, torch.Tensor]] = {"weights.safetensors": {}, "scales.safetensors": {}}
    numbers: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if is_quantized(name, tensor):
            weight_OI, scale_BC, numbers[name] = quantized(tensor, *block)
            files["weights.safetensors"][name] = weight_OI
            files["scales.safetensors"][f"{name}_scale_inv"] = scale_BC
        else:
            files["weights.safetensors"][name] = numbers[name] = tensor
    for file, tensors in files.items():
        save_file(tensors, target / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(numbers, plain / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION | {"weight_block_size": list(block)}
    (target / "config.json").write_text(json.dumps(config))
    return len(files["scales.safetensors"])
