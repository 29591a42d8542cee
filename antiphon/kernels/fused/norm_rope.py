"""RMS norm, alone or behind a residual addition, and rotary embedding: one pass over memory each.

Shapes: as in `antiphon.kernels.norm_rope`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import wide_type

__all__ = ["add_rms_norm_fused", "apply_rope_fused", "rms_norm_fused"]

_NORM_ELEMENTS = 2048  # of a tile, unless one row has more
_ROPE_ELEMENTS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x,
    residual_TD,
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
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows are (token, head) pairs; `out` and `sum_TD` are contiguous."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    tokens = (rows // num_heads).to(tl.int64)
    starts = tokens * stride_token + (rows % num_heads) * stride_head
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    value = tl.load(x + starts[:, None] + columns[None, :], mask=mask, other=0)
    dtype = value.dtype
    if ADD:
        residual = tl.load(residual_TD + tokens[:, None] * residual_stride + columns[None, :], mask=mask, other=0)
        value = (value.to(WIDE) + residual.to(WIDE)).to(dtype)
        tl.store(sum_TD + places, value, mask=mask)
    wide = value.to(WIDE)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / D + EPS)[:, None]
    weight = tl.load(weight_D + columns, mask=columns < D, other=0)
    # Rounded before the weight too, as the reference does.
    normed = normed.to(dtype).to(WIDE) * weight.to(WIDE)[None, :]
    tl.store(out + places, normed.to(dtype), mask=mask)


def rms_norm_fused(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rms_norm`; x: [..., D]."""
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        shape, x = x.shape, x.reshape(-1, x.shape[-1]).contiguous()
        return rms_norm_fused(x, weight_D, eps).view(shape)
    out = x.new_empty(x.shape)
    num_heads, stride_head = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    if x.numel():
        _launch_norm(x, None, weight_D, out, None, num_heads, (x.stride(0), stride_head), eps)
    return out


def add_rms_norm_fused(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `add_rms_norm`."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual_TD = residual_TD if residual_TD.stride(1) == 1 else residual_TD.contiguous()
    out_TD, sum_TD = x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)
    if x_TD.numel():
        _launch_norm(x_TD, residual_TD, weight_D, out_TD, sum_TD, 1, (x_TD.stride(0), 0), eps)
    return out_TD, sum_TD


def _launch_norm(
    x: torch.Tensor,
    residual_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    out: torch.Tensor,
    sum_TD: torch.Tensor | None,
    num_heads: int,
    strides: tuple[int, int],
    eps: float,
) -> None:
    size = x.shape[-1]
    num_rows = x.numel() // size
    block_d = triton.next_power_of_2(size)
    block_r = max(1, _NORM_ELEMENTS // block_d)
    _norm_kernel[(triton.cdiv(num_rows, block_r),)](
        x,
        x if residual_TD is None else residual_TD,
        weight_D,
        out,
        out if sum_TD is None else sum_TD,
        num_rows,
        num_heads,
        *strides,
        0 if residual_TD is None else residual_TD.stride(0),
        EPS=eps,
        D=size,
        ADD=residual_TD is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        WIDE=wide_type(x.dtype),
        num_warps=8 if block_d > 4096 else 4,
    )


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
    WIDE: tl.constexpr,
):
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
    # `out` may be `x`, and interleaved pairs go to places that other threads read.
    tl.debug_barrier()
    target = out + (tokens * out_stride_token + heads * out_stride_head)[:, None] + pairs[None, :]
    dtype = out.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target + P, (second * cos + first * sin).to(dtype), mask=mask)


def apply_rope_fused(
    x: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `apply_rope`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(x.shape) if out is None else out
    assert out.shape == x.shape and out.stride(-1) == 1, "out has another shape than x, or gaps inside its heads"
    num_heads = x.shape[1] if x.dim() == 3 else 1
    num_rows, num_pairs = x.shape[0] * num_heads, x.shape[-1] // 2
    if not x.numel():
        return out
    block_p = triton.next_power_of_2(num_pairs)
    block_r = max(1, _ROPE_ELEMENTS // block_p)
    _rope_kernel[(triton.cdiv(num_rows, block_r),)](
        x,
        cos_TP.contiguous(),
        sin_TP.contiguous(),
        out,
        num_rows,
        num_heads,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        out.stride(0),
        out.stride(1) if out.dim() == 3 else 0,
        P=num_pairs,
        INTERLEAVED=interleaved,
        BLOCK_R=block_r,
        BLOCK_P=block_p,
        WIDE=wide_type(x.dtype),
    )
    return out
