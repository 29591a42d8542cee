"""Causal attention of a prompt's slice to its whole context in the paged cache, without copying the cache together.

Method: FlashAttention-2 (Dao, 2023); a program computes a tile of new tokens of one query head, and walks through the
positions in order. Tiles with the most positions begin first.

Shapes: `S` new tokens of one request, `B` its blocks, `H` query heads, `G` key/value heads, `Q` numbers of a head,
`M` new tokens of a tile, `L` positions of a tile.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.attention_items import shared_memory
from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, power_of_two

_TILES = ((128, 64, 5, 8), (64, 64, 3, 4), (64, 32, 3, 4), (32, 32, 1, 4))
"""Tokens, positions, stages and warps. The first one that fits into shared memory is used."""


@triton.jit
def _attend_tile(
    q,
    head_cache,
    table_B,
    begin,
    end,
    rows,
    top,
    weight,
    acc,
    SCALE: tl.constexpr,
    ROW: tl.constexpr,
    VALUE: tl.constexpr,
    Q: tl.constexpr,
    BS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Positions begin:end. MASKED: some are hidden from some rows, or `end` cuts a tile. rows: positions of rows."""
    columns = tl.arange(0, BLOCK_Q)
    for start in tl.range(begin, end, BLOCK_L, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_L)
        seen = positions < end
        if BS >= BLOCK_L:  # a tile lies in one block, because tiles begin at multiples of BLOCK_L
            block = tl.load(table_B + start // BS).to(tl.int64) + tl.zeros([BLOCK_L], tl.int64)
        else:
            block = tl.load(table_B + positions // BS, mask=seen, other=0).to(tl.int64)
        places = head_cache + (block * BS + positions % BS) * ROW
        there = seen[:, None]
        if BLOCK_Q != Q:
            there = there & (columns < Q)[None, :]
        if MASKED or BLOCK_Q != Q:
            key = tl.load(places[:, None] + columns[None, :], mask=there, other=0.0)
        else:
            key = tl.load(places[:, None] + columns[None, :])
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * SCALE
        if MASKED:
            scores = tl.where((positions[None, :] <= rows[:, None]) & seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        old = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        weight = weight * old + tl.sum(p, 1)
        if MASKED or BLOCK_Q != Q:
            value = tl.load(places[:, None] + VALUE + columns[None, :], mask=there, other=0.0)
        else:
            value = tl.load(places[:, None] + VALUE + columns[None, :])
        acc = tl.dot(p.to(value.dtype), value, acc * old[:, None], input_precision="ieee")
        top = new_top
    return top, weight, acc


@triton.jit(do_not_specialize=["num_new", "length"])
def context_kernel(
    q_SHQ,
    cache,
    table_B,
    out_SHQ,
    num_new,
    length,
    stride_token,
    stride_head,
    SCALE: tl.constexpr,  # times log2(e)
    H: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    BS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0)
    new_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_Q)
    real = (new_M < num_new)[:, None]
    if BLOCK_Q != Q:
        real = real & (columns < Q)[None, :]
    places = new_M.to(tl.int64)[:, None]
    q = tl.load(q_SHQ + places * stride_token + head * stride_head + columns[None, :], mask=real, other=0.0)
    group = head // (H // G)
    head_cache = cache + group * Q
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_Q], tl.float32)
    first = length - num_new + tile * BLOCK_M  # position of the tile's first token
    rows = first + tl.arange(0, BLOCK_M)
    end = tl.minimum(first + BLOCK_M, length)
    clear = (first + 1) // BLOCK_L * BLOCK_L  # every row sees the positions before it
    top, weight, acc = _attend_tile(
        q, head_cache, table_B, 0, clear, rows, top, weight, acc,
        SCALE, 2 * G * Q, G * Q, Q, BS, BLOCK_Q, BLOCK_L, STAGES, False,
    )  # fmt: skip
    top, weight, acc = _attend_tile(
        q, head_cache, table_B, clear, end, rows, top, weight, acc,
        SCALE, 2 * G * Q, G * Q, Q, BS, BLOCK_Q, BLOCK_L, STAGES, True,
    )  # fmt: skip
    acc = acc / weight[:, None]
    target = out_SHQ + (places * H + head) * Q + columns[None, :]
    tl.store(target, acc.to(out_SHQ.dtype.element_ty), mask=real)


def attend_context(
    q_SHQ: torch.Tensor,
    cache_blocks: torch.Tensor,
    block_ids_B: torch.Tensor,
    length: int,
    *,
    num_kv_heads: int,
    scale: float,
    tiles: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """See `AttentionBackend.attend_context`. tiles: tokens, positions, stages and warps, for measurements."""
    assert cache_blocks.is_contiguous() and block_ids_B.is_contiguous(), "a cache or block ids with gaps"
    q_SHQ = q_SHQ if q_SHQ.stride(2) == 1 else q_SHQ.contiguous()
    num_new, num_heads, head_size = q_SHQ.shape
    out_SHQ = q_SHQ.new_empty(q_SHQ.shape)
    if num_new:
        tiles = tiles or _tiles(q_SHQ.device, head_size, q_SHQ.dtype.itemsize)
        strides = q_SHQ.stride()[:2]
        sizes = (num_heads, num_kv_heads, head_size, cache_blocks.shape[1])
        _context(num_new, length, strides, sizes, scale, tiles)(q_SHQ, cache_blocks, block_ids_B, out_SHQ)
    return out_SHQ


@lru_cache(maxsize=64)
def _tiles(device: torch.device, head_size: int, itemsize: int) -> tuple[int, int, int, int]:
    """Tokens, positions, stages and warps."""
    for tiles in _TILES:
        tokens, positions, stages, _ = tiles
        # The load of the block ids takes part in the pipeline, so two stages are one buffer.
        needed = power_of_two(head_size) * itemsize * (tokens + 2 * positions * (stages // 2 + 1))
        if needed + (8 << 10) <= shared_memory(device):
            return tiles
    return _TILES[-1]


@lru_cache(maxsize=NUM_SHAPES)
def _context(
    num_new: int,
    length: int,
    strides: tuple[int, int],
    sizes: tuple[int, int, int, int],
    scale: float,
    tiles: tuple[int, int, int, int],
) -> Launch:
    num_heads, num_kv_heads, head_size, block_size = sizes
    tokens, positions, stages, num_warps = tiles
    return Launch(
        context_kernel,
        (num_heads, divide_up(num_new, tokens)),
        integers=(num_new, length, *strides),
        constants={
            "SCALE": scale * math.log2(math.e),
            "H": num_heads,
            "G": num_kv_heads,
            "Q": head_size,
            "BS": block_size,
            "BLOCK_M": tokens,
            "BLOCK_Q": max(16, power_of_two(head_size)),
            "BLOCK_L": positions,
            "STAGES": stages,
        },
        num_warps=num_warps,
    )
