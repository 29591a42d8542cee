"""What paged decode attention does around its main kernel: the list of its items before it, the sum of chunks after it.

A text is computed in chunks, counted from its start. An item is one chunk of one request; partial results of items are
added up in order of position. The size of a chunk depends on the length of its own text only (`Chunks`). So the result
of a text does not depend on what else is in the batch.

    list      once a step and lane: the list of items, and where the partial results of each request begin
    attend    one of `paged_gqa`, `paged_latent`: a persistent kernel over items and heads
    combine   adds up the partial results of texts that have several chunks

Only the list knows how large chunks are. An item says all that `attend` must know: one load leads to the ids of its
blocks, and the next to its keys and values. `combine` counts the items of a request.

Items of texts with long chunks come before the others, and whole chunks before the rests. Otherwise, texts of equal
length could give some of the persistent programs all the whole chunks, and others all the rests.

Memory for partial results is bounded: there are no more items than one for each request and one for each short chunk of
`MOST_POSITIONS`. A step that would need more has items of 2, 4, ... chunks (`span`), and only then the last bits of a
text depend on the batch.

Shapes: `N` requests, `B` columns of the block table, `X` items, `H` query heads, `V` numbers of a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, power_of_two
from antiphon.kernels.fused.persistent import resident_programs

MOST_POSITIONS = 1 << 20
"""Positions whose chunks have partial results of their own: more than the KV cache of one GPU holds for most models."""

_INTERPRETED_PROGRAMS = 6


@triton.jit(do_not_specialize=["num_requests", "capacity"])
def items_kernel(
    lens_N,
    items_X4,
    first_N1,
    num_requests,
    capacity,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    LONG_FROM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program n writes the items of request n, and to first_N1[n] where its partial results begin.

    first_N1[N] is the number of items.
    """
    me = tl.program_id(0)
    length = tl.load(lens_N + me).to(tl.int32)
    long = length >= LONG_FROM
    span = length * 0
    total = capacity + 1
    first = span
    whole_begin = span
    rest_begin = span
    while total > capacity:
        span = tl.maximum(span * 2, 1)
        items_N = tl.zeros([BLOCK_N], tl.int32)  # of all requests
        before_N = tl.zeros([BLOCK_N], tl.int32)  # of requests before mine
        whole_N = tl.zeros([BLOCK_N], tl.int32)  # the rest: of requests with chunks like mine
        same_N = tl.zeros([BLOCK_N], tl.int32)
        whole_before_N = tl.zeros([BLOCK_N], tl.int32)
        rests_before_N = tl.zeros([BLOCK_N], tl.int32)
        start = me * 0
        while start < num_requests:
            others = start + tl.arange(0, BLOCK_N)
            lens = tl.load(lens_N + others, mask=others < num_requests, other=0).to(tl.int32)
            sizes = span * tl.where(lens >= LONG_FROM, LONG, SHORT)
            wholes = lens // sizes
            rests = tl.where(lens > wholes * sizes, 1, 0)
            items_N += wholes + rests
            before_N += tl.where(others < me, wholes + rests, 0)
            same = (lens >= LONG_FROM) == long
            whole_N += tl.where(same, wholes, 0)
            same_N += tl.where(same, wholes + rests, 0)
            whole_before_N += tl.where(same & (others < me), wholes, 0)
            rests_before_N += tl.where(same & (others < me), rests, 0)
            start += BLOCK_N
        total = tl.sum(items_N, 0)
        first = tl.sum(before_N, 0)
        begin = tl.where(long, 0, total - tl.sum(same_N, 0))
        whole_begin = begin + tl.sum(whole_before_N, 0)
        rest_begin = begin + tl.sum(whole_N, 0) + tl.sum(rests_before_N, 0)
    size = span * tl.where(long, LONG, SHORT)
    my_whole = length // size
    tl.store(first_N1 + me, first)
    if me == 0:
        tl.store(first_N1 + num_requests, total)
    several = length > size
    start = me * 0
    while start < my_whole:
        chunks = start + tl.arange(0, BLOCK_N)
        items = items_X4 + (whole_begin + chunks) * 4
        mine = chunks < my_whole
        tl.store(items, me + chunks * 0, mask=mine)
        tl.store(items + 1, chunks * size, mask=mine)
        tl.store(items + 2, (chunks + 1) * size, mask=mine)
        tl.store(items + 3, tl.where(several, first + chunks, -1), mask=mine)
        start += BLOCK_N
    if length > my_whole * size:
        item = items_X4 + rest_begin * 4
        tl.store(item, me)
        tl.store(item + 1, my_whole * size)
        tl.store(item + 2, length)
        tl.store(item + 3, tl.where(several, first + my_whole, -1))


@triton.jit
def load_item(items_X4, number, there):
    """The item's request, its first position, the position behind its last, and the place of its partial result.

    The place is -1 if it is the whole text. All are 0 unless `there`.
    """
    item = items_X4 + number * 4
    request = tl.load(item, mask=there, other=0)
    begin = tl.load(item + 1, mask=there, other=0)
    end = tl.load(item + 2, mask=there, other=0)
    place = tl.load(item + 3, mask=there, other=0)
    return request, begin, end, place


@triton.jit
def combine_kernel(
    first_N1,
    part_XHV,
    lse_XH,
    out_NHV,
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HEADS: tl.constexpr,
):
    """HEADS heads of one request: all their partial results, BLOCK_C at a time, in order. Zeros for a length of 0."""
    request = tl.program_id(0)
    first = tl.load(first_N1 + request)
    num_parts = tl.load(first_N1 + request + 1) - first
    columns = tl.arange(0, BLOCK_V)
    inside = columns < V
    if num_parts != 1:
        for number in tl.static_range(HEADS):
            head = tl.program_id(1) * HEADS + number
            top = num_parts * 0 - float("inf")
            weight = num_parts * 0.0
            acc_V = tl.zeros([BLOCK_V], tl.float32)
            start = num_parts * 0
            while start < num_parts:
                parts = start + tl.arange(0, BLOCK_C)
                there = parts < num_parts
                place = (first + parts).to(tl.int64) * H + head
                lse_C = tl.load(lse_XH + place, mask=there, other=float("-inf"))
                part_CV = tl.load(
                    part_XHV + place[:, None] * V + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
                )
                new_top = tl.maximum(top, tl.max(lse_C, 0))
                old = tl.exp2(top - new_top)
                new_C = tl.exp2(lse_C - new_top)
                acc_V = acc_V * old + tl.sum(part_CV * new_C[:, None], 0)
                weight = weight * old + tl.sum(new_C, 0)
                top = new_top
                start += BLOCK_C
            out_V = acc_V / tl.where(weight > 0, weight, 1.0)
            tl.store(
                out_NHV + (request.to(tl.int64) * H + head) * V + columns,
                out_V.to(out_NHV.dtype.element_ty),
                mask=inside,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """Positions of a chunk, by the length of its text.

    Short chunks give a few short texts to many SMs. Long ones save partial results, which are written and read
    again, and the start of an item.
    """

    short: int
    long: int  # a multiple of `short`
    long_from: int  # texts of at least this many positions have long chunks

    def most(self, length: int) -> int:
        """The largest number of chunks of a text with at most `length` positions."""
        return max(divide_up(min(length, self.long_from - 1), self.short), divide_up(length, self.long))


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemList:
    """The items of one step and lane, and memory for their partial results, which its layers use in turn."""

    items_X4: torch.Tensor  # int32, see `load_item`
    first_N1: torch.Tensor  # int32
    part_XHV: torch.Tensor  # float32
    lse_XH: torch.Tensor  # float32, logarithms to base 2


def list_items(
    block_table_NB: torch.Tensor,
    seq_lens_N: torch.Tensor,
    *,
    block_size: int,
    chunks: Chunks,
    num_heads: int,
    value_size: int,
    most_positions: int = MOST_POSITIONS,
) -> ItemList:
    """Queue the list of a step. seq_lens_N: int32, at most block_size times the width of the table.

    The capacity depends on shapes only, so it can be replayed in a graph with other lengths.
    """
    num_requests, width = block_table_NB.shape
    capacity = _capacity(num_requests, width * block_size, chunks, most_positions)
    new = block_table_NB.new_empty
    items = ItemList(
        items_X4=new(capacity, 4, dtype=torch.int32),
        first_N1=new(num_requests + 1, dtype=torch.int32),
        part_XHV=new(capacity, num_heads, value_size, dtype=torch.float32),
        lse_XH=new(capacity, num_heads, dtype=torch.float32),
    )
    if num_requests:
        _list(num_requests, capacity, chunks)(seq_lens_N, items.items_X4, items.first_N1)
    return items


def items_bytes(num_requests: int, most_length: int, *, chunks: Chunks, num_heads: int, value_size: int) -> int:
    """Bytes of a list for texts of at most `most_length` positions."""
    capacity = _capacity(num_requests, most_length, chunks, MOST_POSITIONS)
    return 4 * (capacity * (4 + num_heads * (value_size + 1)) + num_requests + 1)


def _capacity(num_requests: int, most_length: int, chunks: Chunks, most_positions: int) -> int:
    """The most items of a list."""
    return min(num_requests * chunks.most(most_length), num_requests + most_positions // chunks.short)


@lru_cache(maxsize=NUM_SHAPES)
def _list(num_requests: int, capacity: int, chunks: Chunks) -> Launch:
    block_n = min(256, power_of_two(max(16, num_requests)))
    return Launch(
        items_kernel,
        (num_requests, 1),
        integers=(num_requests, capacity),
        constants={
            "SHORT": chunks.short,
            "LONG": chunks.long,
            "LONG_FROM": chunks.long_from,
            "BLOCK_N": block_n,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineTiles:
    """How a program of `combine_kernel` works."""

    heads: int  # one after another
    parts: int  # at a time
    num_warps: int


def combine_tiles(num_heads: int, value_size: int) -> CombineTiles:
    """One warp a program: four took three times as long for 32 heads of 128 numbers."""
    if value_size > 256:
        return CombineTiles(heads=1, parts=4, num_warps=1)
    return CombineTiles(heads=1 if num_heads % 2 else 2, parts=8, num_warps=1)


@lru_cache(maxsize=NUM_SHAPES)
def combine_launch(num_requests: int, num_heads: int, value_size: int, tiles: CombineTiles) -> Launch:
    """Takes first_N1, part_XHV, lse_XH and out_NHV."""
    return Launch(
        combine_kernel,
        (num_requests, num_heads // tiles.heads),
        constants={
            "H": num_heads,
            "V": value_size,
            "BLOCK_V": power_of_two(value_size),
            "BLOCK_C": tiles.parts,
            "HEADS": tiles.heads,
        },
        num_warps=tiles.num_warps,
    )


def persistent_programs(
    kernel: Any,
    pointers: tuple[torch.dtype, ...],
    num_integers: int,
    constants: Mapping[str, Any],
    num_warps: int,
    device: torch.device,
) -> int:
    """Programs of the kernel that are resident on the device at a time: one more takes a second round, with a tail.

    pointers: the dtypes of its tensors. Compiles the kernel, which the launches then find in Triton's cache.
    """
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    with torch.cuda.device(device):
        compiled = kernel.warmup(*pointers, *[16] * num_integers, **constants, num_warps=num_warps, grid=(1,))
        compiled._init_handles()
    properties = torch.cuda.get_device_properties(device)
    per_sm = resident_programs(compiled.n_regs, compiled.metadata.shared, num_warps, properties)
    return per_sm * int(properties.multi_processor_count)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have."""
    if device.type != "cuda":
        return 1 << 20
    index = torch.cuda.current_device() if device.index is None else device.index
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["max_shared_mem"]
