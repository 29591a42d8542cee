"""Grouped-query attention of decoding requests over the paged cache, read once and where it lies.

Items and sum of chunks: `attention_items`. Ids of a chunk's blocks are loaded before its positions and gathered from
registers, so the loads of keys and values depend on no other load of the loop.

Shapes: `N` requests, `B` columns of the block table, `H` query heads, `G` key/value heads, `Q` numbers of a head,
`X` items, `L` positions of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.attention_items import (
    Chunks,
    CombineTiles,
    ItemList,
    combine_launch,
    combine_tiles,
    load_item,
    persistent_programs,
    shared_memory,
)
from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, power_of_two

CHUNKS = Chunks(short=256, long=256, long_from=0)
"""512 is up to 5 % faster for 64 sequences and more, and up to 35 % slower for one of 4,096."""

_ROWS = 16  # the least that tensor cores take; query heads of one key/value head
_TILE = 32
_STAGES = 3
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_requests", "table_stride"])
def attend_kernel(
    q_NHQ,
    cache,
    table_NB,
    items_X4,
    first_N1,
    part_XHQ,
    lse_XH,
    out_NHQ,
    num_requests,
    table_stride,
    q_stride,
    SCALE: tl.constexpr,  # times log2(e)
    H: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    BS: tl.constexpr,
    TILES: tl.constexpr,  # of query heads per key/value head
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PART: tl.constexpr,  # positions whose block ids are in registers at a time
    PART_BLOCKS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):
    PER: tl.constexpr = H // G
    UNITS: tl.constexpr = G * TILES
    columns = tl.arange(0, BLOCK_Q)
    total = tl.load(first_N1 + num_requests) * UNITS
    work_0 = tl.program_id(0)
    # There is a place for an item for each program, so this need not wait for `total`.
    next_request, _, next_end, next_place = load_item(items_X4, work_0 // UNITS, work_0 >= 0)
    for work in tl.range(work_0, total, tl.num_programs(0)):
        request = next_request
        # Not carried over from the iteration before, as the rest is: Triton 3.6 drops a carried lower bound of a loop
        # that contains a pipelined one, and every iteration would begin where the first one did. Chunks begin at
        # multiples of PART; where the compiler sees it, it need not divide for every row of the cache.
        item_begin = tl.load(items_X4 + work // UNITS * 4 + 1) // PART * PART
        item_end = next_end
        place = next_place
        next_work = work + tl.num_programs(0)
        next_request, _, next_end, next_place = load_item(items_X4, next_work // UNITS, next_work < total)
        table = table_NB + request.to(tl.int64) * table_stride
        unit = work % UNITS
        group = unit // TILES
        inside = (unit % TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
        heads = group * PER + inside
        real = (inside < PER)[:, None]
        if BLOCK_Q != Q:
            real = real & (columns < Q)[None, :]
        rows_H = request.to(tl.int64) * H + heads
        q_heads = q_NHQ + request.to(tl.int64) * q_stride + heads * Q
        q = tl.load(q_heads[:, None] + columns[None, :], mask=real, other=0.0)
        head_cache = cache + group * Q
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_Q], tl.float32)
        for begin in tl.range(item_begin, item_end, PART):
            end = tl.minimum(begin + PART, item_end)
            if PART_BLOCKS > 1:
                numbers = begin // BS + tl.arange(0, PART_BLOCKS)
                ids = tl.load(table + numbers, mask=numbers * BS < end, other=0).to(tl.int32)
            else:
                only = tl.load(table + begin // BS).to(tl.int32)
            for start in tl.range(begin, end, BLOCK_L, num_stages=STAGES):
                positions = start + tl.arange(0, BLOCK_L)
                seen = positions < end
                if PART_BLOCKS > 1:
                    # A pipelined loop computes addresses past its last iteration, so the index is kept in range.
                    block = tl.gather(ids, (positions - begin) // BS % PART_BLOCKS, 0)
                else:
                    block = only + tl.zeros([BLOCK_L], tl.int32)
                rows = head_cache + (block.to(tl.int64) * BS + positions % BS) * (2 * G * Q)
                there = seen[:, None]
                if BLOCK_Q != Q:
                    there = there & (columns < Q)[None, :]
                key = tl.load(rows[:, None] + columns[None, :], mask=there, other=0.0)
                scores = tl.dot(q, tl.trans(key), input_precision="ieee") * SCALE
                scores = tl.where(seen[None, :], scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                old = tl.exp2(top - new_top)
                p = tl.exp2(scores - new_top[:, None])
                weight = weight * old + tl.sum(p, 1)
                value = tl.load(rows[:, None] + (G * Q) + columns[None, :], mask=there, other=0.0)
                acc = tl.dot(p.to(value.dtype), value, acc * old[:, None], input_precision="ieee")
                top = new_top
        acc = acc / weight[:, None]
        if place < 0:
            target = out_NHQ + rows_H[:, None] * Q + columns[None, :]
            tl.store(target, acc.to(out_NHQ.dtype.element_ty), mask=real)
        else:
            rows_H = place.to(tl.int64) * H + heads
            tl.store(part_XHQ + rows_H[:, None] * Q + columns[None, :], acc, mask=real)
            tl.store(lse_XH + rows_H, top + tl.log2(weight), mask=inside < PER)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedGroups:
    """Decode attention of one shape, dtype, block size and device."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    block_size: int
    dtype: torch.dtype
    device: torch.device
    chunks: Chunks = CHUNKS

    def decode(
        self,
        q_NHQ: torch.Tensor,
        cache_blocks: torch.Tensor,
        block_table_NB: torch.Tensor,
        seq_lens_N: torch.Tensor,
        items: ItemList,
    ) -> torch.Tensor:
        """See `AttentionBackend.decode`; `items` is from `list_items` with the same chunks."""
        assert cache_blocks.is_contiguous() and block_table_NB.stride(1) == 1, "a cache or table with gaps"
        assert cache_blocks.shape[1] == self.block_size, f"blocks of {cache_blocks.shape[1]}, not {self.block_size}"
        if q_NHQ.stride()[1:] != (self.head_size, 1):  # heads side by side, as in a merged projection
            q_NHQ = q_NHQ.contiguous()
        num_requests = q_NHQ.shape[0]
        out_NHQ = q_NHQ.new_empty(q_NHQ.shape)
        if num_requests:
            memory = (items.items_X4, items.first_N1, items.part_XHV, items.lse_XH)
            strides = (block_table_NB.stride(0), q_NHQ.stride(0))
            attend = _attend(self, num_requests, strides, items.items_X4.shape[0])
            attend(q_NHQ, cache_blocks, block_table_NB, *memory, out_NHQ)
            combine = combine_launch(num_requests, self.num_heads, self.head_size, self.combine_tiles)
            combine(*memory[1:], out_NHQ)
        return out_NHQ

    @property
    def combine_tiles(self) -> CombineTiles:
        return combine_tiles(self.num_heads, self.head_size)

    def constants(self) -> dict[str, Any]:
        """The constants of `attend_kernel`."""
        block_q = max(16, power_of_two(self.head_size))
        tile_bytes = 2 * _TILE * block_q * self.dtype.itemsize
        return {
            "SCALE": self.scale * math.log2(math.e),
            "H": self.num_heads,
            "G": self.num_kv_heads,
            "Q": self.head_size,
            "BS": self.block_size,
            "TILES": divide_up(self.num_heads // self.num_kv_heads, _ROWS),
            "BLOCK_H": _ROWS,
            "BLOCK_Q": block_q,
            "PART": self.chunks.short,  # every chunk begins at a multiple of it
            "PART_BLOCKS": max(1, self.chunks.short // self.block_size),
            "BLOCK_L": _TILE,
            # At least two programs per SM, where memory allows.
            "STAGES": _STAGES if 2 * _STAGES * tile_bytes < shared_memory(self.device) else 2,
        }


@lru_cache(maxsize=NUM_SHAPES)
def _attend(attention: PagedGroups, num_requests: int, strides: tuple[int, int], capacity: int) -> Launch:
    """strides: of the block table's rows and of the requests' queries."""
    constants = attention.constants()
    units = capacity * attention.num_kv_heads * int(constants["TILES"])
    return Launch(
        attend_kernel,
        (min(units, _resident(attention)), 1),
        integers=(num_requests, *strides),
        constants=constants,
        num_warps=_NUM_WARPS,
    )


@lru_cache(maxsize=64)
def _resident(attention: PagedGroups) -> int:
    dtype, i32, f32 = attention.dtype, torch.int32, torch.float32
    pointers = (dtype, dtype, i32, i32, i32, f32, f32, dtype)
    return persistent_programs(attend_kernel, pointers, 3, attention.constants(), _NUM_WARPS, attention.device)
