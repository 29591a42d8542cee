"""Block-wise float8 checkpoints, the format in which DeepSeek-V3 is published, and their dequantization.

Each weight [out, in] in float8 (e4m3) comes with a `..._scale_inv`, which holds one factor per block of 128 x 128;
blocks at the edges may be smaller. Weights are dequantized one by one during loading; layers never see float8.
Source: DeepSeek-V3 Technical Report, 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.core.errors import is_whole
from antiphon.models.config import ConfigFile

_USE_BFLOAT16 = "use a bfloat16 checkpoint"


def scale_name(weight_name: str) -> str:
    """Name of the scale of a weight; a checkpoint has it if and only if the weight is quantized."""
    return weight_name + "_scale_inv"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFp8:
    """The block that one scale covers: rows of outputs, columns of inputs."""

    rows: int
    columns: int

    @staticmethod
    def read(file: ConfigFile) -> BlockFp8 | None:
        """Read `quantization_config`; `None` if the checkpoint is not quantized.

        Raises `ModelError` for any other quantization method, and names it.
        """
        settings = file.get("quantization_config")
        if settings is None:
            return None
        if not isinstance(settings, dict):
            raise file.fault("quantization_config", settings, remedy="use an object")
        method, block = settings.get("quant_method", "unknown"), settings.get("weight_block_size")
        if method != "fp8" or block is None:
            limit = f"only 'fp8' with a weight_block_size is supported, and weight_block_size={block!r}"
            raise file.fault("quant_method", method, limit=limit, remedy=_USE_BFLOAT16)
        for key, supported in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
            if settings.get(key, supported) != supported:
                limit = f"only {supported!r} is supported"
                raise file.fault(key, settings[key], limit=limit, remedy=_USE_BFLOAT16)
        if not isinstance(block, list) or len(block) != 2 or not all(is_whole(size) and size > 0 for size in block):
            raise file.fault("weight_block_size", block, remedy="use two integers of at least 1")
        return BlockFp8(rows=block[0], columns=block[1])

    def scale_shape(self, num_outputs: int, num_inputs: int) -> tuple[int, int]:
        """Shape of the scales of a weight [outputs, inputs]."""
        return -(-num_outputs // self.rows), -(-num_inputs // self.columns)

    def dequantize(self, weight_OI: torch.Tensor, scale_BC: torch.Tensor, out_OI: torch.Tensor) -> None:
        """Fill `out_OI` with the weight times the scale of its block, computed in float32; all on one device.

        One row of blocks is dequantized at a time, to keep the float32 copy small.
        """
        stripes = zip(torch.split(weight_OI, self.rows), scale_BC.float(), torch.split(out_OI, self.rows), strict=True)
        for weight_RI, scale_C, out_RI in stripes:
            scale_I = scale_C.repeat_interleave(self.columns)[: weight_RI.shape[1]]
            out_RI.copy_(weight_RI.float() * scale_I)
