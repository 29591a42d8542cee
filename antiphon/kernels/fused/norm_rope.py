"""RMS norm, alone or after a residual addition, and rotary embedding, each in one pass over memory.

Shapes: as in `antiphon.kernels.norm_rope`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, is_double, power_of_two

_NORM_ELEMENTS = 2048  # per tile, or one row if that is longer
_ROPE_ELEMENTS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x,
    residual_TD,
    more_TD,
    weight_D,
    out,
    sum_TD,
    num_rows,
    num_heads,
    stride_token,
    stride_head,
    residual_stride,
    EPS: tl.constexpr,
    D: tl.constexpr,
    ADD: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Rows are (token, head) pairs; `out`, `sum_TD` and `more_TD` are contiguous."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    tokens = (rows // num_heads).to(tl.int64)
    starts = tokens * stride_token + (rows % num_heads) * stride_head
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    value = tl.load(x + starts[:, None] + columns[None, :], mask=mask, other=0)
    dtype = value.dtype
    if MORE:
        more = tl.load(more_TD + places, mask=mask, other=0)
        value = (value.to(WIDE) + more.to(WIDE)).to(dtype)
    if ADD:
        residual = tl.load(residual_TD + tokens[:, None] * residual_stride + columns[None, :], mask=mask, other=0)
        value = (value.to(WIDE) + residual.to(WIDE)).to(dtype)
        tl.store(sum_TD + places, value, mask=mask)
    wide = value.to(WIDE)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / D + EPS)[:, None]
    weight = tl.load(weight_D + columns, mask=columns < D, other=0)
    # Rounded before the weight too, as in the reference.
    normed = normed.to(dtype).to(WIDE) * weight.to(WIDE)[None, :]
    tl.store(out + places, normed.to(dtype), mask=mask)


@lru_cache(maxsize=NUM_SHAPES)
def _norm(
    num_rows: int,
    num_heads: int,
    size: int,
    strides: tuple[int, int],
    residual_stride: int | None,
    more: bool,
    eps: float,
    double: bool,
) -> Launch:
    """residual_stride: row stride of the residual that is added first; None if there is none. more: a third addend."""
    block_d = power_of_two(size)
    block_r = max(1, _NORM_ELEMENTS // block_d)
    return Launch(
        _norm_kernel,
        (divide_up(num_rows, block_r), 1),
        integers=(num_rows, num_heads, *strides, residual_stride or 0),
        constants={
            "EPS": eps,
            "D": size,
            "ADD": residual_stride is not None,
            "MORE": more,
            "BLOCK_R": block_r,
            "BLOCK_D": block_d,
            "DOUBLE": double,
        },
        num_warps=8 if block_d > 4096 else 4,
    )


def rms_norm_fused(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rms_norm`; x: [..., D]."""
    shape, strides = x.shape, x.stride()
    if len(shape) == 2 and strides[1] == 1:
        num_rows, num_heads, row_strides = shape[0], 1, (strides[0], 0)
    elif len(shape) == 3 and strides[2] == 1:
        num_rows, num_heads, row_strides = shape[0] * shape[1], shape[1], (strides[0], strides[1])
    else:
        return rms_norm_fused(x.reshape(-1, shape[-1]).contiguous(), weight_D, eps).view(shape)
    out = x.new_empty(shape)
    if num_rows:
        launch = _norm(num_rows, num_heads, shape[-1], row_strides, None, False, eps, is_double(x.dtype))
        launch(x, x, x, weight_D, out, out)
    return out


def add_rms_norm_fused(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    more_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `add_rms_norm`. The thread that reads an element of the residual also writes the sum there."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    sum_TD = residual_TD = residual_TD.contiguous()
    num_tokens, size = x_TD.shape
    out_TD = x_TD.new_empty(num_tokens, size)
    if num_tokens:
        has_more, double = more_TD is not None, is_double(x_TD.dtype)
        launch = _norm(num_tokens, 1, size, (x_TD.stride(0), 0), size, has_more, eps, double)
        launch(x_TD, residual_TD, x_TD if more_TD is None else more_TD.contiguous(), weight_D, out_TD, sum_TD)
    return out_TD, sum_TD


@triton.jit(do_not_specialize=["num_rows"])
def _rope_kernel(
    x,
    cos_TP,
    sin_TP,
    out,
    num_rows,
    num_heads,
    stride_token,
    stride_head,
    out_stride_token,
    out_stride_head,
    P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    pairs = tl.arange(0, BLOCK_P)
    mask = (rows < num_rows)[:, None] & (pairs < P)[None, :]
    tokens = (rows // num_heads).to(tl.int64)
    heads = rows % num_heads
    angles = tokens[:, None] * P + pairs[None, :]
    cos = tl.load(cos_TP + angles, mask=mask, other=0).to(WIDE)
    sin = tl.load(sin_TP + angles, mask=mask, other=0).to(WIDE)
    source = x + (tokens * stride_token + heads * stride_head)[:, None]
    if INTERLEAVED:
        first = tl.load(source + 2 * pairs[None, :], mask=mask, other=0).to(WIDE)
        second = tl.load(source + 2 * pairs[None, :] + 1, mask=mask, other=0).to(WIDE)
    else:
        first = tl.load(source + pairs[None, :], mask=mask, other=0).to(WIDE)
        second = tl.load(source + pairs[None, :] + P, mask=mask, other=0).to(WIDE)
    # `out` may be `x`, and interleaved pairs are written where other threads read.
    tl.debug_barrier()
    target = out + (tokens * out_stride_token + heads * out_stride_head)[:, None] + pairs[None, :]
    dtype = out.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target + P, (second * cos + first * sin).to(dtype), mask=mask)


@lru_cache(maxsize=NUM_SHAPES)
def _rope(
    num_rows: int,
    num_heads: int,
    num_pairs: int,
    strides: tuple[int, int],
    out_strides: tuple[int, int],
    interleaved: bool,
    double: bool,
) -> Launch:
    block_p = power_of_two(num_pairs)
    block_r = max(1, _ROPE_ELEMENTS // block_p)
    return Launch(
        _rope_kernel,
        (divide_up(num_rows, block_r), 1),
        integers=(num_rows, num_heads, *strides, *out_strides),
        constants={
            "P": num_pairs,
            "INTERLEAVED": interleaved,
            "BLOCK_R": block_r,
            "BLOCK_P": block_p,
            "DOUBLE": double,
        },
    )


def apply_rope_fused(
    x: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `apply_rope`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(x.shape) if out is None else out
    strides, out_strides = (x.stride(), out.stride()) if x.dim() == 3 else (_one_head(x), _one_head(out))
    assert out.shape == x.shape and out_strides[2] == 1, "out differs from x in shape, or has gaps inside its heads"
    num_heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * num_heads
    if x.numel():
        launch = _rope(
            num_rows, num_heads, x.shape[-1] // 2, strides[:2], out_strides[:2], interleaved, is_double(x.dtype)
        )
        launch(x, cos_TP.contiguous(), sin_TP.contiguous(), out)
    return out


def _one_head(x_TP: torch.Tensor) -> tuple[int, int, int]:
    """The strides of [T, P] viewed as [T, 1, P]."""
    return x_TP.stride(0), 0, x_TP.stride(1)
