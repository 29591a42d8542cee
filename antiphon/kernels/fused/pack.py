"""Packing tokens and routes into rows, and adding up partial sums.

The first program of each row also packs its routes.

Shapes: as in `antiphon.kernels.pack`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, is_double, power_of_two, stride_unit

_MAX_COLUMNS = 2048
_PARTS_AT_A_TIME = 8
_SUM_BLOCK = 1024


@triton.jit
def _pack_kernel(
    x_out_TD,
    weights_out_TK,
    ids_out_TK,
    x_TD,
    weights_TK,
    ids_TK,
    x_out_units,
    weights_out_stride,
    ids_out_stride,
    x_units,
    weights_stride,
    ids_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x_D = tl.load(x_TD + row * x_units * UNIT + columns, mask=columns < D, other=0)
    tl.store(x_out_TD + row * x_out_units * OUT_UNIT + columns, x_D, mask=columns < D)
    if tl.program_id(1) == 0:
        slots = tl.arange(0, BLOCK_K)
        weight_K = tl.load(weights_TK + row * weights_stride + slots, mask=slots < K, other=0)
        id_K = tl.load(ids_TK + row * ids_stride + slots, mask=slots < K, other=0)
        weights_out = weights_out_TK + row * weights_out_stride + slots
        tl.store(weights_out, weight_K.to(weights_out_TK.dtype.element_ty), mask=slots < K)
        tl.store(ids_out_TK + row * ids_out_stride + slots, id_K.to(ids_out_TK.dtype.element_ty), mask=slots < K)


@lru_cache(maxsize=NUM_SHAPES)
def _pack(
    num_tokens: int, size: int, top_k: int, x_strides: tuple[int, int], other_strides: tuple[int, int, int, int]
) -> Launch:
    """x_strides: of the rows written, then read. other_strides: of the weights and ids written, then read."""
    out_unit, unit = map(stride_unit, x_strides)
    block = min(_MAX_COLUMNS, power_of_two(size))
    weights_out, ids_out, weights, ids = other_strides
    return Launch(
        _pack_kernel,
        (num_tokens, divide_up(size, block)),
        integers=(x_strides[0] // out_unit, weights_out, ids_out, x_strides[1] // unit, weights, ids),
        constants={
            "D": size,
            "K": top_k,
            "OUT_UNIT": out_unit,
            "UNIT": unit,
            "BLOCK_K": power_of_two(top_k),
            "BLOCK_D": block,
        },
    )


def pack_rows_fused(
    x_out_TD: torch.Tensor,
    weights_out_TK: torch.Tensor,
    ids_out_TK: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> None:
    """See `pack_rows`."""
    outputs, sources = (x_out_TD, weights_out_TK, ids_out_TK), (x_TD, weights_TK, ids_TK)
    assert all(tensor.stride(1) == 1 for tensor in outputs), "rows have gaps inside them"
    tensors = (*outputs, *(tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in sources))
    strides = [tensor.stride() for tensor in tensors]
    (num_tokens, size), top_k = x_TD.shape, ids_TK.shape[1]
    assert x_out_TD.shape == x_TD.shape and weights_out_TK.shape == ids_out_TK.shape == weights_TK.shape == ids_TK.shape
    if num_tokens:
        x_out, weights_out, ids_out, x, weights, ids = (stride[0] for stride in strides)
        _pack(num_tokens, size, top_k, (x_out, x), (weights_out, ids_out, weights, ids))(*tensors)


@triton.jit
def _add_kernel(
    part_0, part_1, part_2, part_3, part_4, part_5, part_6, part_7, out, size,
    NUM: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    parts = (part_0, part_1, part_2, part_3, part_4, part_5, part_6, part_7)
    total = tl.load(part_0 + places, mask=mask, other=0).to(WIDE)
    for number in tl.static_range(1, NUM):
        total += tl.load(parts[number] + places, mask=mask, other=0).to(WIDE)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


@lru_cache(maxsize=NUM_SHAPES)
def _add(size: int, num_parts: int, double: bool) -> Launch:
    return Launch(
        _add_kernel,
        (divide_up(size, _SUM_BLOCK), 1),
        integers=(size,),
        constants={"NUM": num_parts, "DOUBLE": double, "BLOCK": _SUM_BLOCK},
    )


def add_parts_fused(first_TD: torch.Tensor, *others_TD: torch.Tensor) -> torch.Tensor:
    """See `add_parts`. One launch for up to 8 parts; the sums of more of them stay wide in between."""
    dtype = first_TD.dtype
    parts = [first_TD, *others_TD]
    while len(parts) > _PARTS_AT_A_TIME:
        wide = torch.promote_types(dtype, torch.float32)
        parts = [_add_some(parts[:_PARTS_AT_A_TIME], wide), *parts[_PARTS_AT_A_TIME:]]
    return _add_some(parts, dtype)


def _add_some(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(parts[0].shape, dtype=dtype, device=parts[0].device)
    if out.numel():
        parts = [part.contiguous() for part in parts]
        unused = [parts[0]] * (_PARTS_AT_A_TIME - len(parts))
        _add(out.numel(), len(parts), is_double(dtype))(*parts, *unused, out)
    return out
