"""Absorbed latent attention of decoding requests over the paged cache: a tile of latents is loaded once, as key and
value.

Items and sum of chunks: `attention_items`. Up to 32 heads are limited by memory: 16 heads are the rows of a product,
and two programs fit on an SM. More heads are limited by arithmetic: 64 heads are the rows, if the device has the shared
memory for it.

Scores of a tile are a sum of 576 products for few columns, so a warp has few independent products, and the latency of
one after another counts. `HALVES` cuts latents in two with an accumulator each. Between the products, the warps wait
for one another as seldom as possible: ids of a tile's blocks are scalars, loaded one tile ahead; sums of weights are
kept per position until the item ends (`LATE_SUM`).

Shapes: as in `paged_gqa`; `C` numbers of a latent, `P` of a rotary key.
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


@triton.jit
def _block_ids(table, start, end, BS: tl.constexpr, BLOCK_L: tl.constexpr):
    """Ids of the at most four blocks with positions start to start + BLOCK_L; 0 from `end` on."""
    tl.static_assert(BLOCK_L <= 4 * BS)
    first = table + start // BS
    id_0 = tl.load(first, mask=start < end, other=0)
    id_1 = id_0
    id_2 = id_0
    id_3 = id_0
    if BLOCK_L > BS:
        id_1 = tl.load(first + 1, mask=start + BS < end, other=0)
    if BLOCK_L > 2 * BS:
        id_2 = tl.load(first + 2, mask=start + 2 * BS < end, other=0)
        id_3 = tl.load(first + 3, mask=start + 3 * BS < end, other=0)
    return id_0, id_1, id_2, id_3


@triton.jit(do_not_specialize=["num_requests", "table_stride"])
def attend_kernel(
    q_NHX,
    cache,
    table_NB,
    items_X4,
    first_N1,
    part_XHC,
    lse_XH,
    out_NHC,
    num_requests,
    table_stride,
    SCALE: tl.constexpr,  # times log2(e)
    H: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    UNITS: tl.constexpr,  # groups of heads
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
    HALVES: tl.constexpr,  # whether latents are cut in two
    LATE_SUM: tl.constexpr,
    AHEAD: tl.constexpr,  # whether the next item and the ids of its first blocks are loaded ahead
):
    dtype: tl.constexpr = cache.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_C // 2 if HALVES else BLOCK_C
    latent = tl.arange(0, WIDTH)
    rope = tl.arange(0, BLOCK_P)
    inside = tl.arange(0, BLOCK_L)
    stride = tl.num_programs(0)
    work_0 = tl.program_id(0)
    total = tl.load(first_N1 + num_requests) * UNITS
    # There is a place for an item for each program, so this need not wait for `total`.
    next_request, next_begin, next_end, next_place = load_item(items_X4, work_0 // UNITS, work_0 >= 0)
    id_0 = total * 0
    id_1 = id_0
    id_2 = id_0
    id_3 = id_0
    if AHEAD:
        table = table_NB + next_request.to(tl.int64) * table_stride
        id_0, id_1, id_2, id_3 = _block_ids(
            table, next_begin, tl.where(work_0 < total, next_end, next_begin), BS, BLOCK_L
        )
    for work in tl.range(work_0, total, stride):
        request = next_request
        begin = next_begin
        end = next_end
        place = next_place
        table = table_NB + request.to(tl.int64) * table_stride
        next_number = (work + stride) // UNITS
        if AHEAD:
            next_request, next_begin, next_end, next_place = load_item(items_X4, next_number, work + stride < total)
        else:
            id_0, id_1, id_2, id_3 = _block_ids(table, begin, end, BS, BLOCK_L)
        heads = (work % UNITS) * BLOCK_H + tl.arange(0, BLOCK_H)
        if H % BLOCK_H == 0:
            real = tl.full([BLOCK_H, 1], True, tl.int1)
        else:
            real = (heads < H)[:, None]
        real_c = real
        real_r = real
        if BLOCK_C != C:
            real_c = real & (latent < C)[None, :]
        if BLOCK_P != P:
            real_r = real & (rope < P)[None, :]
        q_rows = q_NHX + request.to(tl.int64) * (H * (C + P)) + heads[:, None] * (C + P)
        q_c = tl.load(q_rows + latent[None, :], mask=real_c, other=0.0)
        acc = tl.zeros([BLOCK_H, WIDTH], tl.float32)
        if HALVES:
            real_d = real
            if BLOCK_C != C:
                real_d = real & (WIDTH + latent < C)[None, :]
            q_d = tl.load(q_rows + WIDTH + latent[None, :], mask=real_d, other=0.0)
            acc_d = tl.zeros([BLOCK_H, WIDTH], tl.float32)
        q_r = tl.load(q_rows + C + rope[None, :], mask=real_r, other=0.0)
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        if LATE_SUM:
            weight = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
        else:
            weight = tl.zeros([BLOCK_H], tl.float32)
        for start in tl.range(begin, end, BLOCK_L, num_stages=STAGES):
            seen = start + inside < end
            block = id_0 + tl.zeros([BLOCK_L], tl.int32)
            if BLOCK_L > BS:
                block = tl.where(inside < BS, block, id_1)
            if BLOCK_L > 2 * BS:
                block = tl.where(inside < 2 * BS, block, tl.where(inside < 3 * BS, id_2, id_3))
            id_0, id_1, id_2, id_3 = _block_ids(table, start + BLOCK_L, end, BS, BLOCK_L)
            rows = (cache + (block.to(tl.int64) * BS + (start + inside) % BS) * (C + P))[:, None]
            there_c = seen[:, None]
            there_r = seen[:, None]
            if BLOCK_C != C:
                there_c = there_c & (latent < C)[None, :]
            if BLOCK_P != P:
                there_r = there_r & (rope < P)[None, :]
            c = tl.load(rows + latent[None, :], mask=there_c, other=0.0)
            if HALVES:
                there_d = seen[:, None]
                if BLOCK_C != C:
                    there_d = there_d & (WIDTH + latent < C)[None, :]
                d = tl.load(rows + WIDTH + latent[None, :], mask=there_d, other=0.0)
            r = tl.load(rows + C + rope[None, :], mask=there_r, other=0.0)
            scores = tl.dot(q_c, tl.trans(c), input_precision="ieee")
            scores = tl.dot(q_r, tl.trans(r), scores, input_precision="ieee") * SCALE
            if HALVES:
                # Scaled apart: a plain sum of products would become one chain of products again.
                scores += tl.dot(q_d, tl.trans(d), input_precision="ieee") * SCALE
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            old = tl.exp2(top - new_top)
            p = tl.exp2(scores - new_top[:, None])
            if LATE_SUM:
                weight = weight * old[:, None] + p
            else:
                weight = weight * old + tl.sum(p, 1)
            p_row = p.to(dtype)
            acc = tl.dot(p_row, c, acc * old[:, None], input_precision="ieee")
            if HALVES:
                acc_d = tl.dot(p_row, d, acc_d * old[:, None], input_precision="ieee")
            top = new_top
        if AHEAD:
            next_table = table_NB + next_request.to(tl.int64) * table_stride
            id_0, id_1, id_2, id_3 = _block_ids(next_table, next_begin, next_end, BS, BLOCK_L)
        if LATE_SUM:
            weight_H = tl.sum(weight, 1)
        else:
            weight_H = weight
        acc = acc / weight_H[:, None]
        if HALVES:
            acc_d = acc_d / weight_H[:, None]
        if place < 0:
            target = out_NHC + request.to(tl.int64) * (H * C) + heads[:, None] * C + latent[None, :]
            tl.store(target, acc.to(out_NHC.dtype.element_ty), mask=real_c)
            if HALVES:
                tl.store(target + WIDTH, acc_d.to(out_NHC.dtype.element_ty), mask=real_d)
        else:
            rows_H = place.to(tl.int64) * H + heads
            part = part_XHC + rows_H[:, None] * C + latent[None, :]
            tl.store(part, acc, mask=real_c)
            if HALVES:
                tl.store(part + WIDTH, acc_d, mask=real_d)
            tl.store(lse_XH + rows_H, top + tl.log2(weight_H), mask=heads < H)
        if not AHEAD:
            next_request, next_begin, next_end, next_place = load_item(items_X4, next_number, work + stride < total)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentTiles:
    """How a program of `attend_kernel` works."""

    rows: int  # heads of a program
    positions: int
    stages: int
    num_warps: int
    chunks: Chunks
    halves: bool
    late_sum: bool
    ahead: bool


FEW_HEADS = LatentTiles(
    rows=16,
    positions=32,
    stages=3,
    num_warps=4,
    chunks=Chunks(short=256, long=1024, long_from=4096),
    halves=True,
    late_sum=True,
    ahead=True,
)
MANY_HEADS = LatentTiles(
    rows=64,
    positions=64,
    stages=2,
    num_warps=8,
    chunks=Chunks(short=512, long=1024, long_from=2049),
    halves=False,
    late_sum=False,
    ahead=False,
)
_MANY = 33  # heads
_MANY_BYTES = 222 << 10  # of shared memory that MANY_HEADS takes with latents of 512 + 64 numbers of 2 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedLatents:
    """Decode attention of one shape, dtype, block size and device."""

    num_heads: int
    latent_size: int  # C
    rope_size: int  # P
    scale: float
    block_size: int
    dtype: torch.dtype
    device: torch.device
    own_tiles: LatentTiles | None = None
    """Instead of those that are best for the number of heads."""
    own_combine: CombineTiles | None = None

    @property
    def chunks(self) -> Chunks:
        return self.tiles.chunks

    @property
    def tiles(self) -> LatentTiles:
        if self.own_tiles is not None:
            return self.own_tiles
        fits = shared_memory(self.device) >= _MANY_BYTES and self.dtype.itemsize == 2 and self.latent_size <= 512
        return MANY_HEADS if self.num_heads >= _MANY and fits else FEW_HEADS

    @property
    def combine_tiles(self) -> CombineTiles:
        return self.own_combine or combine_tiles(self.num_heads, self.latent_size)

    def decode(
        self,
        q_NHX: torch.Tensor,
        cache_blocks: torch.Tensor,
        block_table_NB: torch.Tensor,
        seq_lens_N: torch.Tensor,
        items: ItemList,
    ) -> torch.Tensor:
        """See `AttentionBackend.decode`: queries [N, H, C + P], results [N, H, C]."""
        assert cache_blocks.is_contiguous() and block_table_NB.stride(1) == 1, "a cache or table with gaps"
        assert cache_blocks.shape[1] == self.block_size, f"blocks of {cache_blocks.shape[1]}, not {self.block_size}"
        q_NHX = q_NHX.contiguous()
        num_requests = q_NHX.shape[0]
        out_NHC = q_NHX.new_empty(num_requests, self.num_heads, self.latent_size)
        if num_requests:
            memory = (items.items_X4, items.first_N1, items.part_XHV, items.lse_XH)
            attend = _attend(self, num_requests, block_table_NB.stride(0), items.items_X4.shape[0])
            attend(q_NHX, cache_blocks, block_table_NB, *memory, out_NHC)
            combine = combine_launch(num_requests, self.num_heads, self.latent_size, self.combine_tiles)
            combine(*memory[1:], out_NHC)
        return out_NHC

    def constants(self) -> dict[str, Any]:
        """The constants of `attend_kernel`."""
        tiles = self.tiles
        block_c, block_p = max(32, power_of_two(self.latent_size)), max(16, power_of_two(self.rope_size))
        stages = tiles.stages
        stage_bytes = tiles.positions * (block_c + block_p) * self.dtype.itemsize
        if stages * stage_bytes > shared_memory(self.device):
            stages = 2 if 2 * stage_bytes < shared_memory(self.device) else 1
        return {
            "SCALE": self.scale * math.log2(math.e),
            "H": self.num_heads,
            "C": self.latent_size,
            "P": self.rope_size,
            "BS": self.block_size,
            "UNITS": divide_up(self.num_heads, tiles.rows),
            "BLOCK_H": tiles.rows,
            "BLOCK_C": block_c,
            "BLOCK_P": block_p,
            "BLOCK_L": tiles.positions,
            "STAGES": stages,
            "HALVES": tiles.halves,
            "LATE_SUM": tiles.late_sum,
            "AHEAD": tiles.ahead,
        }


@lru_cache(maxsize=NUM_SHAPES)
def _attend(attention: PagedLatents, num_requests: int, table_stride: int, capacity: int) -> Launch:
    constants = attention.constants()
    return Launch(
        attend_kernel,
        (min(capacity * int(constants["UNITS"]), _resident(attention)), 1),
        integers=(num_requests, table_stride),
        constants=constants,
        num_warps=attention.tiles.num_warps,
    )


@lru_cache(maxsize=64)
def _resident(attention: PagedLatents) -> int:
    dtype, i32, f32 = attention.dtype, torch.int32, torch.float32
    pointers = (dtype, dtype, i32, i32, i32, f32, f32, dtype)
    constants, num_warps = attention.constants(), attention.tiles.num_warps
    return persistent_programs(attend_kernel, pointers, 2, constants, num_warps, attention.device)
