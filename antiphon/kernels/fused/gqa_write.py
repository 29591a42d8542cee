"""Norm, rotation and cache write of keys and values in one pass over the merged projection, in place.

A program handles one head of several tokens, so all its rows are queries, or all are keys, or all are values.

Shapes: as in `antiphon.kernels.gqa_write`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, is_double, power_of_two
from antiphon.kernels.gqa_write import HeadNorms

_TILE_ELEMENTS = 2048


@triton.jit
def _normed(x, scale_T1, q_weight_Q, k_weight_Q, columns, real, is_query, dtype: tl.constexpr, WIDE: tl.constexpr):
    """Apply the norm, rounding before and after the weight as the reference does."""
    q_weight = tl.load(q_weight_Q + columns, mask=real, other=0)
    k_weight = tl.load(k_weight_Q + columns, mask=real, other=0)
    weight = tl.where(is_query, q_weight, k_weight).to(WIDE)
    return ((x * scale_T1).to(dtype).to(WIDE) * weight).to(dtype).to(WIDE)


@triton.jit(do_not_specialize=["num_tokens"])
def _gqa_write_kernel(
    qkv_TX,
    cos_TP,
    sin_TP,
    q_weight_Q,
    k_weight_Q,
    cache,
    slots_T,
    num_tokens,
    stride_token,
    H: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    dtype: tl.constexpr = qkv_TX.dtype.element_ty
    head = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (tokens < num_tokens)[:, None]
    slots = tl.load(slots_T + tokens, mask=tokens < num_tokens, other=0)
    rows = qkv_TX + (tokens.to(tl.int64) * stride_token + head * Q)[:, None]
    cached = cache + (slots * (2 * G * Q) + (head - H) * Q)[:, None]  # keys, then values; not for queries
    if head >= H + G:
        copied = tl.arange(0, BLOCK_Q)[None, :]
        real = inside & (copied < Q)
        tl.store(cached + copied, tl.load(rows + copied, mask=real, other=0), mask=real)
    else:
        pairs = tl.arange(0, BLOCK_P)[None, :]
        columns = 2 * P + tl.arange(0, BLOCK_REST)[None, :]  # those that are not rotated
        turn, stay = inside & (pairs < P), inside & (columns < Q)
        first = tl.load(rows + pairs, mask=turn, other=0).to(WIDE)
        second = tl.load(rows + P + pairs, mask=turn, other=0).to(WIDE)
        rest = tl.load(rows + columns, mask=stay, other=0).to(WIDE)
        if NORM:
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
            scale = tl.rsqrt(squares / Q + EPS)[:, None]
            query = head < H
            first = _normed(first, scale, q_weight_Q, k_weight_Q, pairs, pairs < P, query, dtype, WIDE)
            second = _normed(second, scale, q_weight_Q + P, k_weight_Q + P, pairs, pairs < P, query, dtype, WIDE)
            rest = _normed(rest, scale, q_weight_Q, k_weight_Q, columns, columns < Q, query, dtype, WIDE)
        angles = tokens.to(tl.int64)[:, None] * P + pairs
        cos = tl.load(cos_TP + angles, mask=turn, other=0).to(WIDE)
        sin = tl.load(sin_TP + angles, mask=turn, other=0).to(WIDE)
        turned_first = (first * cos - second * sin).to(dtype)
        turned_second = (second * cos + first * sin).to(dtype)
        tl.debug_barrier()  # several threads may load the same numbers: all must have read them before the stores
        tl.store(rows + pairs, turned_first, mask=turn)
        tl.store(rows + P + pairs, turned_second, mask=turn)
        tl.store(rows + columns, rest.to(dtype), mask=stay)
        key = head >= H
        tl.store(cached + pairs, turned_first, mask=turn & key)
        tl.store(cached + P + pairs, turned_second, mask=turn & key)
        tl.store(cached + columns, rest.to(dtype), mask=stay & key)


@lru_cache(maxsize=NUM_SHAPES)
def _gqa_write(
    num_tokens: int,
    stride_token: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_pairs: int,
    eps: float | None,
    double: bool,
) -> Launch:
    block_q = power_of_two(head_size)
    block_t = max(1, _TILE_ELEMENTS // block_q)
    return Launch(
        _gqa_write_kernel,
        (num_heads + 2 * num_kv_heads, divide_up(num_tokens, block_t)),
        integers=(num_tokens, stride_token),
        constants={
            "H": num_heads,
            "G": num_kv_heads,
            "Q": head_size,
            "P": num_pairs,
            "EPS": eps or 0.0,
            "NORM": eps is not None,
            "BLOCK_T": block_t,
            "BLOCK_P": power_of_two(num_pairs),
            "BLOCK_REST": power_of_two(max(1, head_size - 2 * num_pairs)),
            "BLOCK_Q": block_q,
            "DOUBLE": double,
        },
    )


def norm_rotate_write_fused(
    qkv_TX: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    cache_blocks: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    num_kv_heads: int,
    head_size: int,
    norms: HeadNorms | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `norm_rotate_write`; the results are views of `qkv_TX`."""
    num_tokens, width = qkv_TX.shape
    num_heads = width // head_size - 2 * num_kv_heads
    assert qkv_TX.stride(1) == 1 and cos_TP.is_contiguous() and sin_TP.is_contiguous() and slots_T.is_contiguous()
    assert cache_blocks.is_contiguous() and cache_blocks.shape[2] == 2 * num_kv_heads * head_size, "wrong cache shape"
    if num_tokens:
        launch = _gqa_write(
            num_tokens,
            qkv_TX.stride(0),
            num_heads,
            num_kv_heads,
            head_size,
            cos_TP.shape[1],
            None if norms is None else norms.eps,
            is_double(qkv_TX.dtype),
        )
        q_weight_Q, k_weight_Q = (qkv_TX, qkv_TX) if norms is None else norms[:2]
        launch(qkv_TX, cos_TP, sin_TP, q_weight_Q, k_weight_Q, cache_blocks, slots_T)
    heads_TXQ = qkv_TX.view(num_tokens, width // head_size, head_size)
    q_THQ, key_TGQ, value_TGQ = torch.split(heads_TXQ, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    return q_THQ, key_TGQ, value_TGQ
