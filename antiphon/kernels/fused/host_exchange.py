"""Exchanges of equal slabs through host memory that all ranks map: one kernel uploads, waits, and downloads.

    senders     piece by piece: copy it into this rank's host memory ── barrier ── flag: its next epoch, at the reader
    receivers   piece by piece: wait for a peer's flag ── barrier ── copy the piece into this rank's box

It is one kernel because a kernel behind another one on a stream starts when that has ended: then every rank would
upload everything first, and PCIe would carry one direction at a time. Here a piece is downloaded while later ones are
being uploaded. Senders wait for nobody, and receivers only for senders of the same exchange, so every exchange ends,
whatever order the programs start in; a server's largest grid, twice `MAX_PROGRAMS`, fits on a GPU at once.

A slab is cut into slices, the same way on both ends; a piece is a slice for one reader, or for all if they get the
same. Every piece has an epoch of its own, which only grows. So flags are never cleared, a captured graph can be
replayed, and exchanges of other sizes may come in between. Sender and receiver of a rank count apart, because one may
have ended before the other has begun.

Flags lie in the reader's host memory: a write crosses PCIe without an answer, and a poll, which waits for one, stays
within the reader's NUMA node. One thread a receiver polls, at most `MAX_PROGRAMS` reads of 4 bytes a round trip.

Memory order: the barrier before a release makes it cover the stores of all warps; the barrier behind an acquire makes
all warps come after it. Peers' slices are read by volatile loads, which are relaxed at system scope: they fetch a line
anew, whatever a cache still holds. (Triton ignores the modifier `.cv` for this GPU.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up
from antiphon.kernels.fused.put import NOTICE_NS, store_release, wait_for_epoch
from antiphon.kernels.slices import ALIGNMENT, LARGEST_SLICE, MAX_SLICES, slice_bytes

MAX_PROGRAMS = 64
"""The most senders, and the most receivers."""

_UNIT: tl.constexpr = tl.constexpr(2)  # words of 8 bytes
_KEPT_LAUNCHES = 8 * NUM_SHAPES  # one for each size and label


@triton.jit
def upload_piece(
    source,
    out,
    number,
    other,
    step,
    target_step,
    size,
    slice_size,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy slice `number` of the slab for a peer, the `other`-th, into this rank's host memory.

    out: where the slab for rank 0 lies. Steps between the slabs of ranks, sizes and slices in units.
    """
    peer = tl.where(other >= RANK, other + 1, other)
    columns = tl.arange(0, BLOCK)
    words = number * slice_size * _UNIT + columns
    mask = (columns < slice_size * _UNIT) & (words < size * _UNIT)
    value = tl.load(source + (peer - FIRST) * step * _UNIT + words, mask=mask)
    tl.store(out + peer * target_step * _UNIT + words, value, mask=mask)


@triton.jit
def download_piece(
    held,
    box,
    number,
    other,
    size,
    slice_size,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy slice `number` of the slab that the `other`-th peer holds for this rank into the box.

    held: that slab. box: the place of the lowest peer's slab; others follow in rank order, this rank's included.
    """
    peer = tl.where(other >= RANK, other + 1, other)
    columns = tl.arange(0, BLOCK)
    words = number * slice_size * _UNIT + columns
    mask = (columns < slice_size * _UNIT) & (words < size * _UNIT)
    value = tl.load(held + words, mask=mask, volatile=True)
    tl.store(box + (peer - FIRST) * size * _UNIT + words, value, mask=mask)


@triton.jit
def _send(
    source,
    bases_W,
    sent,
    piece,
    num_senders,
    step,
    target,
    target_step,
    size,
    slice_size,
    flag,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    SAME: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COPIES: tl.constexpr = 1 if SAME else SIZE - 1
    num_pieces = tl.cdiv(size, slice_size) * COPIES
    out = tl.multiple_of(tl.load(bases_W + RANK).to(tl.pointer_type(tl.int64)) + target * _UNIT, 16)
    while piece < num_pieces:
        number, other = piece // COPIES, piece % COPIES
        count = sent + other * SLICES + number
        epoch = tl.load(count) + 1
        upload_piece(source, out, number, other, step, target_step, size, slice_size, RANK, FIRST, BLOCK)
        tl.debug_barrier()
        place = flag + 4 * (RANK * SLICES + number)
        if SAME:
            for every in tl.static_range(SIZE - 1):
                store_release(tl.load(bases_W + (every + 1 if every >= RANK else every)) + place, epoch)
        else:
            store_release(tl.load(bases_W + tl.where(other >= RANK, other + 1, other)) + place, epoch)
        tl.store(count, epoch)  # behind the barrier, so that every thread has read it
        piece += num_senders


@triton.jit
def _receive(
    box,
    bases_W,
    received,
    piece,
    num_receivers,
    target,
    target_step,
    size,
    slice_size,
    flag,
    word,
    code,
    notice_ns,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mine = tl.load(bases_W + RANK)
    num_pieces = tl.cdiv(size, slice_size) * (SIZE - 1)
    while piece < num_pieces:
        number, other = piece // (SIZE - 1), piece % (SIZE - 1)
        peer = tl.where(other >= RANK, other + 1, other)
        count = received + other * SLICES + number
        epoch = tl.load(count) + 1
        wait_for_epoch(mine + flag + 4 * (peer * SLICES + number), epoch, word, code + peer, notice_ns)
        tl.debug_barrier()
        held = tl.load(bases_W + peer).to(tl.pointer_type(tl.int64))
        held = tl.multiple_of(held + (target + RANK * target_step) * _UNIT, 16)
        download_piece(held, box, number, other, size, slice_size, RANK, FIRST, BLOCK)
        tl.store(count, epoch)
        piece += num_receivers


@triton.jit(
    do_not_specialize=(
        "step",
        "target",
        "target_step",
        "size",
        "slice_size",
        "flag",
        "num_senders",
        "word",
        "code",
        "notice_ns",
    )
)
def _exchange_kernel(
    source,
    box,
    bases_W,
    sent,
    received,
    step,
    target,
    target_step,
    size,
    slice_size,
    flag,
    num_senders,
    word,
    code,
    notice_ns,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    SAME: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_senders:
        _send(
            source,
            bases_W,
            sent,
            program,
            num_senders,
            step,
            target,
            target_step,
            size,
            slice_size,
            flag,
            RANK,
            FIRST,
            SIZE,
            SAME,
            SLICES,
            BLOCK,
        )
    else:
        _receive(
            box,
            bases_W,
            received,
            program - num_senders,
            tl.num_programs(0) - num_senders,
            target,
            target_step,
            size,
            slice_size,
            flag,
            word,
            code,
            notice_ns.to(tl.int64),
            RANK,
            FIRST,
            SIZE,
            SLICES,
            BLOCK,
        )


@lru_cache(maxsize=_KEPT_LAUNCHES)
def _exchange(
    num_bytes: int,
    target: int,
    target_step: int,
    flag: int,
    word: int,
    code: int,
    rank: int,
    first: int,
    size: int,
    same_source: bool,
    num_programs: int,
) -> Launch:
    slice_size = slice_bytes(num_bytes, size - 1, num_programs)
    num_slices = divide_up(num_bytes, slice_size)
    assert num_slices <= MAX_SLICES and num_programs <= MAX_PROGRAMS
    num_senders = min(num_programs, num_slices * (1 if same_source else size - 1))
    num_receivers = min(num_programs, num_slices * (size - 1))
    steps = (0 if same_source else num_bytes, target, target_step, num_bytes, slice_size)
    return Launch(
        _exchange_kernel,
        (num_senders + num_receivers, 1),
        integers=(*[number // ALIGNMENT for number in steps], flag, num_senders, word, code, NOTICE_NS),
        constants={
            "RANK": rank,
            "FIRST": first,
            "SIZE": size,
            "SAME": same_source,
            "SLICES": MAX_SLICES,
            "BLOCK": LARGEST_SLICE // ALIGNMENT * _UNIT.value,
        },
    )


def exchange_slabs(
    source: torch.Tensor,
    box: torch.Tensor,
    bases_W: torch.Tensor,
    sent: torch.Tensor,
    received: torch.Tensor,
    *,
    rank: int,
    first: int,
    num_bytes: int,
    same_source: bool,
    target: int,
    target_step: int,
    flag: int,
    word: int,
    code: int,
    num_programs: int,
) -> None:
    """Send a slab of `num_bytes` to every peer through host memory, and receive theirs, on the current stream.

    source: int64; the slab for the rank `first`, the lowest peer, followed by those for other ranks unless all get the
        same one (`same_source`).
    box: int64; the place of the lowest peer's slab, followed by those of other ranks.
    bases_W: int64 [W], the addresses of all ranks' host memory. target: the byte offset of a rank's slabs in it, that
        for rank 0 first, in steps of `target_step`. flag: the offset of int32 [W, MAX_SLICES], initially 0, by sender.
    sent, received: int32 [W - 1, MAX_SLICES] on this device, initially 0. Only this kernel writes them, and the flags.
    word, code: for the device watch, as in `wait_for_slabs`.
    num_programs: the most senders, and the most receivers. It must be the same on all ranks.

    All bytes but the flag's are multiples of `ALIGNMENT`.
    """
    assert num_bytes > 0 and all(number % ALIGNMENT == 0 for number in (num_bytes, target, target_step))
    size = bases_W.shape[0]
    _exchange(num_bytes, target, target_step, flag, word, code, rank, first, size, same_source, num_programs)(
        source, box, bases_W, sent, received
    )
