"""Checkpoints in safetensors: what is in them, what a rank needs, and the loading of just that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from antiphon.core.errors import ModelError
from antiphon.models.block_fp8 import BlockFp8, scale_name
from antiphon.models.config import ConfigFile, read_json

__all__ = ["Checkpoint", "LoadProgress", "StoredTensor", "check_checkpoint", "load_weights", "missing_files"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # what a weight can be stored in without a scale
_FLOAT8 = "F8_E4M3"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What the header of a file says of a tensor; dtype as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES.get(self.dtype, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How much of what one rank needs it has read; its text is "35% of 14.2 GB"."""

    tensors: int
    num_tensors: int
    bytes: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.bytes / max(self.num_bytes, 1):.0%} of {self.num_bytes / 1e9:.1f} GB"


def missing_files(folder: Path) -> list[str]:
    """Files of weights that should be in a checkpoint's folder and are not. Raises `ModelError` for a wrong index."""
    names = set(_weight_map(folder).values()) if (folder / _INDEX).exists() else {_SINGLE}
    return sorted(name for name in names if not (folder / name).exists())


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{folder / _INDEX} has no weight_map of file names; download it again")
    return weight_map


class Checkpoint:
    """The safetensors files of one folder. Opens files when they are needed and reads nothing before.

    Raises `ModelError` if there are none, or if the folder's config.json names a quantisation that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = folder / "config.json"
        self.block_fp8 = BlockFp8.read(ConfigFile(config)) if config.exists() else None
        self._open_files: dict[str, tuple[Any, frozenset[str]]] = {}
        if (folder / _INDEX).exists():
            self._file_of = _weight_map(folder)
        elif (folder / _SINGLE).exists():
            _, names = self._open(_SINGLE)
            self._file_of = dict.fromkeys(names, _SINGLE)
        else:
            raise ModelError(f"{folder} has neither {_INDEX} nor {_SINGLE}; {_what_to_do(folder)}")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def stored(self, name: str) -> StoredTensor:
        """From the header of the file. Raises `ModelError` if the tensor is missing."""
        header = self._file_with(name).get_slice(name)
        return StoredTensor(tuple(header.get_shape()), header.get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, read now, on the CPU in the dtype that it is stored in."""
        try:
            tensor: torch.Tensor = self._file_with(name).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self.folder / self._file_of[name]} cannot be read ({error})") from error
        return tensor

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Names grouped by file, so that a file is read in one go."""
        return sorted(names, key=lambda name: (self._file_of.get(name, ""), name))

    def _file_with(self, name: str) -> Any:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise ModelError(
                f"checkpoint {self.folder} has no tensor {name!r}; download it again, or use its own config"
            )
        opened, names = self._open(file_name)
        if name not in names:
            raise ModelError(
                f"checkpoint {self.folder} has no tensor {name!r}, though its index places it in {file_name}; "
                "download it again"
            )
        return opened

    def _open(self, file_name: str) -> tuple[Any, frozenset[str]]:
        if file_name not in self._open_files:
            path = self.folder / file_name
            if not path.exists():
                missing, files = missing_files(self.folder), set(self._file_of.values())
                raise ModelError(
                    f"{path} does not exist, though the index names it ({len(missing)} of {len(files)} files are "
                    "missing); download it again"
                )
            try:
                opened: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be opened ({error}); download it again") from error
            self._open_files[file_name] = opened, frozenset(opened.keys())
        return self._open_files[file_name]


def _what_to_do(folder: Path) -> str:
    others = sorted(path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern))
    if not others:
        return "pass the folder of a safetensors checkpoint"
    return (
        f"{others[0]} is of another format, so use a safetensors version of the model, or write one with "
        "save_pretrained of transformers"
    )


def check_checkpoint(checkpoint: Checkpoint, expected: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Compare names, shapes and dtypes with the headers of the files, scales of quantised weights too.

    Raises `ModelError` at the first that does not fit.
    """
    for name, tensor in expected:
        stored = checkpoint.stored(name)
        if stored.shape != tuple(tensor.shape):
            raise ModelError(
                f"checkpoint {checkpoint.folder} has {name!r} with shape {list(stored.shape)}; "
                f"its config.json needs {list(tensor.shape)}"
            )
        if scale_name(name) in checkpoint:
            _check_quantised(checkpoint, name, stored)
        elif stored.dtype == _FLOAT8:
            raise ModelError(
                f"checkpoint {checkpoint.folder} has {name!r} in float8, but no scale {scale_name(name)!r}; "
                "download it again, or use a bfloat16 checkpoint"
            )
        elif stored.dtype not in _ITEM_BYTES:
            raise ModelError(
                f"checkpoint {checkpoint.folder} has {name!r} in {stored.dtype}, which is not supported; use a "
                "checkpoint in bfloat16, float16, float32, or block-wise float8"
            )


def _check_quantised(checkpoint: Checkpoint, name: str, stored: StoredTensor) -> None:
    block, scale = checkpoint.block_fp8, checkpoint.stored(scale_name(name))
    where = f"checkpoint {checkpoint.folder} has"
    if block is None:
        raise ModelError(
            f"{where} {scale_name(name)!r}, but its config.json has no quantization_config with a weight_block_size; "
            "use the config.json that was published with these weights"
        )
    if stored.dtype != _FLOAT8 or len(stored.shape) != 2:
        raise ModelError(
            f"{where} {scale_name(name)!r} beside a tensor {list(stored.shape)} in {stored.dtype}; "
            f"only matrices in {_FLOAT8} are scaled, so download it again, or use a bfloat16 checkpoint"
        )
    needed = block.scale_shape(*stored.shape)
    if scale.shape != needed or scale.dtype not in _ITEM_BYTES:
        raise ModelError(
            f"{where} {scale_name(name)!r} with shape {list(scale.shape)} in {scale.dtype}; blocks of "
            f"{block.rows} x {block.columns} need {list(needed)} in a float format, so download it again"
        )


def load_weights(
    checkpoint: Checkpoint,
    targets: Iterable[tuple[str, torch.Tensor]],
    *,
    progress: Callable[[LoadProgress], None] | None = None,
) -> None:
    """Read every named tensor into its target, converting the dtype; quantised ones are multiplied out on the way.

    Only these and their scales are read from disk.
    progress: called after every tensor.
    Raises `ModelError` for what `check_checkpoint` refuses, before the first tensor is read.
    """
    target_of = dict(targets)
    check_checkpoint(checkpoint, target_of.items())
    bytes_of = {name: _bytes_to_read(checkpoint, name) for name in target_of}
    num_bytes, bytes_read = sum(bytes_of.values()), 0
    for number, name in enumerate(checkpoint.in_file_order(target_of), start=1):
        _fill(target_of[name], checkpoint, name)
        bytes_read += bytes_of[name]
        if progress is not None:
            progress(LoadProgress(tensors=number, num_tensors=len(target_of), bytes=bytes_read, num_bytes=num_bytes))


def _bytes_to_read(checkpoint: Checkpoint, name: str) -> int:
    names = [name, scale_name(name)] if scale_name(name) in checkpoint else [name]
    return sum(checkpoint.stored(each).num_bytes for each in names)


def _fill(target: torch.Tensor, checkpoint: Checkpoint, name: str) -> None:
    stored = checkpoint.tensor(name)
    if scale_name(name) not in checkpoint:
        target.copy_(stored)
        return
    assert checkpoint.block_fp8 is not None, "check_checkpoint has refused it"
    # Multiplied out where the weight will be: there are hundreds of gigabytes of them, and the CPU is slow at it.
    scale = checkpoint.tensor(scale_name(name)).to(target.device)
    checkpoint.block_fp8.dequantise(stored.to(target.device), scale, target)
