"""Choices that all launches share."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = ["column_block", "stride_unit", "wide_type"]

_MAX_COLUMN_BLOCK = 1024
_LARGEST_UNIT = 16


def column_block(size: int) -> int:
    """Columns of one program: a power of two."""
    return int(min(_MAX_COLUMN_BLOCK, triton.next_power_of_2(size)))


def stride_unit(stride: int) -> int:
    """The largest power of two up to 16 that divides the stride.

    Triton only asks whether an integer is a multiple of 16. Rows of a slab are multiples of 16 bytes, 8 numbers of
    bfloat16: passing the stride in known units of 8 keeps loads of 16 bytes.
    """
    return math.gcd(stride, _LARGEST_UNIT)


def wide_type(dtype: torch.dtype) -> tl.dtype:
    """What sums of `dtype` are computed in: float32 at least."""
    return tl.float64 if dtype == torch.float64 else tl.float32
