"""Absorbed latent attention of decoding requests over the paged cache: a tile of latents is loaded once, as key and
value.

Plan, sum of chunks and gathered block ids: as in `paged_gqa`. Up to 32 heads are limited by memory: 16 heads are the
rows of a product, and two programs fit on an SM. More heads are limited by arithmetic: 64 heads are the
rows, if the device has the shared memory for it.

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

from antiphon.kernels.fused.attention_plan import Plan, combine_launch, persistent_programs, shared_memory
from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, power_of_two


@triton.jit(do_not_specialize=["num_requests", "table_stride"])
def attend_kernel(
    q_NHX,
    cache,
    table_NB,
    lens_N,
    items_X,
    first_N2,
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
    CHUNK: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype: tl.constexpr = cache.dtype.element_ty
    latent = tl.arange(0, BLOCK_C)
    rope = tl.arange(0, BLOCK_P)
    total = tl.load(first_N2 + num_requests) * UNITS
    span = tl.load(first_N2 + num_requests + 1)
    work_0 = tl.program_id(0)
    packed = tl.load(items_X + work_0 // UNITS, mask=work_0 < total, other=0)
    for work in tl.range(work_0, total, tl.num_programs(0)):
        request = packed // 65536
        item = packed % 65536
        next_work = work + tl.num_programs(0)
        if BLOCK_H <= 16:  # else registers are short
            packed = tl.load(items_X + next_work // UNITS, mask=next_work < total, other=0)
        length = tl.load(lens_N + request).to(tl.int32)
        table = table_NB + request.to(tl.int64) * table_stride
        heads = (work % UNITS) * BLOCK_H + tl.arange(0, BLOCK_H)
        real = (heads < H)[:, None]
        real_c = real
        real_r = real
        if BLOCK_C != C:
            real_c = real & (latent < C)[None, :]
        if BLOCK_P != P:
            real_r = real & (rope < P)[None, :]
        q_rows = q_NHX + request.to(tl.int64) * (H * (C + P)) + heads[:, None] * (C + P)
        q_c = tl.load(q_rows + latent[None, :], mask=real_c, other=0.0)
        q_r = tl.load(q_rows + C + rope[None, :], mask=real_r, other=0.0)
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        item_begin = item * span * CHUNK
        item_end = tl.minimum(item_begin + span * CHUNK, length)
        for begin in tl.range(item_begin, item_end, CHUNK):
            end = tl.minimum(begin + CHUNK, item_end)
            if CHUNK_BLOCKS > 1:
                numbers = begin // BS + tl.arange(0, CHUNK_BLOCKS)
                ids = tl.load(table + numbers, mask=numbers * BS < end, other=0).to(tl.int32)
            else:
                only = tl.load(table + begin // BS).to(tl.int32)
            for start in tl.range(begin, end, BLOCK_L, num_stages=STAGES):
                positions = start + tl.arange(0, BLOCK_L)
                seen = positions < end
                if CHUNK_BLOCKS > 1:
                    # A pipelined loop computes addresses past its last iteration, so the index is kept in range.
                    block = tl.gather(ids, (positions - begin) // BS % CHUNK_BLOCKS, 0)
                else:
                    block = only + tl.zeros([BLOCK_L], tl.int32)
                rows = (cache + (block.to(tl.int64) * BS + positions % BS) * (C + P))[:, None]
                there_c = seen[:, None]
                there_r = seen[:, None]
                if BLOCK_C != C:
                    there_c = there_c & (latent < C)[None, :]
                if BLOCK_P != P:
                    there_r = there_r & (rope < P)[None, :]
                c = tl.load(rows + latent[None, :], mask=there_c, other=0.0)
                r = tl.load(rows + C + rope[None, :], mask=there_r, other=0.0)
                scores = tl.dot(q_c, tl.trans(c), input_precision="ieee")
                scores = tl.dot(q_r, tl.trans(r), scores, input_precision="ieee") * SCALE
                scores = tl.where(seen[None, :], scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                old = tl.exp2(top - new_top)
                p = tl.exp2(scores - new_top[:, None])
                weight = weight * old + tl.sum(p, 1)
                acc = tl.dot(p.to(dtype), c, acc * old[:, None], input_precision="ieee")
                top = new_top
        acc = acc / weight[:, None]
        if length <= span * CHUNK:
            target = out_NHC + request.to(tl.int64) * (H * C) + heads[:, None] * C + latent[None, :]
            tl.store(target, acc.to(out_NHC.dtype.element_ty), mask=real_c)
        else:
            first = (tl.load(first_N2 + request) + item).to(tl.int64) * H
            tl.store(part_XHC + first * C + heads[:, None] * C + latent[None, :], acc, mask=real_c)
            tl.store(lse_XH + first + heads, top + tl.log2(weight), mask=heads < H)
        if BLOCK_H > 16:
            packed = tl.load(items_X + next_work // UNITS, mask=next_work < total, other=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiles:
    rows: int  # heads of a program
    positions: int
    stages: int
    num_warps: int
    chunk: int


_FEW_HEADS = _Tiles(rows=16, positions=32, stages=3, num_warps=4, chunk=256)
_MANY_HEADS = _Tiles(rows=64, positions=64, stages=2, num_warps=8, chunk=512)
_MANY = 33  # heads
_MANY_BYTES = 222 << 10  # of shared memory that _MANY_HEADS takes with latents of 512 + 64 numbers of 2 bytes


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

    @property
    def chunk(self) -> int:
        return self.tiles.chunk

    @property
    def tiles(self) -> _Tiles:
        fits = shared_memory(self.device) >= _MANY_BYTES and self.dtype.itemsize == 2 and self.latent_size <= 512
        return _MANY_HEADS if self.num_heads >= _MANY and fits else _FEW_HEADS

    def decode(
        self,
        q_NHX: torch.Tensor,
        cache_blocks: torch.Tensor,
        block_table_NB: torch.Tensor,
        seq_lens_N: torch.Tensor,
        plan: Plan,
    ) -> torch.Tensor:
        """See `AttentionBackend.decode`: queries [N, H, C + P], results [N, H, C]."""
        assert cache_blocks.is_contiguous() and block_table_NB.stride(1) == 1, "a cache or table with gaps"
        assert cache_blocks.shape[1] == self.block_size, f"blocks of {cache_blocks.shape[1]}, not {self.block_size}"
        q_NHX = q_NHX.contiguous()
        num_requests = q_NHX.shape[0]
        out_NHC = q_NHX.new_empty(num_requests, self.num_heads, self.latent_size)
        if num_requests:
            memory = (plan.items_X, plan.first_N2, plan.part_XHV, plan.lse_XH)
            attend = _attend(self, num_requests, block_table_NB.stride(0), plan.items_X.shape[0])
            attend(q_NHX, cache_blocks, block_table_NB, seq_lens_N, *memory, out_NHC)
            combine = combine_launch(num_requests, self.num_heads, self.latent_size, self.chunk)
            combine(seq_lens_N, *memory[1:], out_NHC)
        return out_NHC

    def constants(self) -> dict[str, Any]:
        """The constants of `attend_kernel`."""
        tiles = self.tiles
        block_c, block_p = max(16, power_of_two(self.latent_size)), max(16, power_of_two(self.rope_size))
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
            "CHUNK": tiles.chunk,
            "CHUNK_BLOCKS": max(1, tiles.chunk // self.block_size),
            "BLOCK_L": tiles.positions,
            "STAGES": stages,
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
    pointers = (dtype, dtype, i32, i32, i32, i32, f32, f32, dtype)
    constants, num_warps = attention.constants(), attention.tiles.num_warps
    return persistent_programs(attend_kernel, pointers, 2, constants, num_warps, attention.device)
