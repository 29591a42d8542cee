"""Block-wise float8 checkpoints, as DeepSeek-V3 is published: what they are, and how they become plain weights.

Beside a weight [out, in] in float8 (e4m3) stands its `..._scale_inv`, one factor a block of 128 x 128, fewer at the
edges. Weights are multiplied out while they are loaded, one at a time; no layer knows of it.
Source: DeepSeek-V3 Technical Report, 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.core.errors import ModelError, is_whole
from antiphon.models.config import ConfigFile


def scale_name(weight_name: str) -> str:
    """Of the tensor that a checkpoint holds beside a quantised weight, and only there."""
    return weight_name + "_scale_inv"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFp8:
    """The size of a block of one scale: rows of outputs, columns of inputs."""

    rows: int
    columns: int

    @staticmethod
    def read(file: ConfigFile) -> BlockFp8 | None:
        """From `quantization_config`; `None` if the checkpoint is not quantised.

        Raises `ModelError` for every other way to quantise, by its name.
        """
        settings = file.get("quantization_config")
        if settings is None:
            return None
        if not isinstance(settings, dict):
            raise ModelError(f"{file.path} has quantization_config={settings!r}; an object is needed")
        method, block = settings.get("quant_method", "unknown"), settings.get("weight_block_size")
        if method != "fp8" or block is None:
            kind = f"{method!r}, without a weight_block_size" if method == "fp8" else f"{method!r}"
            raise ModelError(
                f"{file.path} is quantised ({kind}), which is not supported; only 'fp8' with a weight_block_size is, "
                "so use a bfloat16 checkpoint"
            )
        for key, supported in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
            if settings.get(key, supported) != supported:
                raise ModelError(
                    f"{file.path} is quantised ('fp8') with {key}={settings[key]!r}, which is not supported; only "
                    f"{supported!r} is, so use a bfloat16 checkpoint"
                )
        if not isinstance(block, list) or len(block) != 2 or not all(is_whole(size) and size > 0 for size in block):
            raise ModelError(f"{file.path} has weight_block_size={block!r}; two integers of at least 1 are needed")
        return BlockFp8(rows=block[0], columns=block[1])

    def scale_shape(self, num_outputs: int, num_inputs: int) -> tuple[int, int]:
        """Of the scales of a weight [outputs, inputs]."""
        return -(-num_outputs // self.rows), -(-num_inputs // self.columns)

    def dequantise(self, weight_OI: torch.Tensor, scale_BC: torch.Tensor, out_OI: torch.Tensor) -> None:
        """Fill `out_OI` with the weight times the scale of its block, multiplied in float32; all on one device.

        One row of blocks at a time, so that the float32 numbers take no memory to speak of.
        """
        stripes = zip(torch.split(weight_OI, self.rows), scale_BC.float(), torch.split(out_OI, self.rows), strict=True)
        for weight_RI, scale_C, out_RI in stripes:
            scale_I = scale_C.repeat_interleave(self.columns)[: weight_RI.shape[1]]
            out_RI.copy_(weight_RI.float() * scale_I)
