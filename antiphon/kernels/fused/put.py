"""One-sided exchanges of equal slabs: a kernel that stores them into the peers' memory, and one that waits for theirs.

    put     programs copy; the last one to finish counts the epoch up and writes it to every peer's flag
    wait    one thread spins until every peer's flag has reached this rank's own epoch

Epochs lie on the device and only grow, so flags are never cleared and a captured graph can be replayed. Peers map each
other's memory; `bases_W` holds the address at which this device sees every rank's. Both kernels run on one stream, so
a rank's own put is always before its own wait.

Memory order: a release by one thread does not cover the stores of other warps, hence the barrier before the count. The
count is acquired by the program that writes the flags, at system scope like everything that a peer may see.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up
from antiphon.kernels.slices import ALIGNMENT

_UNIT: tl.constexpr = tl.constexpr(2)  # words in `ALIGNMENT` bytes, which a thread copies at once

_BLOCK = 512
_MAX_PROGRAMS = 32
NOTICE_NS = 200_000_000  # a wait that lasts longer shows on the device watch, which looks about as often


@triton.jit
def copy_to_peers(
    source,
    bases_W,
    step,
    target,
    size,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy this program's share of every peer's slab. step, target and size in units; the memory in words."""
    num_words = size * _UNIT
    num_pieces = tl.cdiv(num_words, BLOCK) * (SIZE - 1)
    piece = tl.program_id(0)
    while piece < num_pieces:
        other = piece % (SIZE - 1)  # peers side by side, so that all links carry data
        peer = tl.where(other >= RANK, other + 1, other)
        columns = piece // (SIZE - 1) * BLOCK + tl.arange(0, BLOCK)
        base = tl.load(bases_W + peer).to(tl.pointer_type(tl.int64))
        out = tl.multiple_of(base + target * _UNIT, 16)
        value = tl.load(source + (peer - FIRST) * step * _UNIT + columns, mask=columns < num_words)
        tl.store(out + columns, value, mask=columns < num_words)
        piece += tl.num_programs(0)


@triton.jit
def store_release(address, value):
    """Write a 32-bit word that peers see after everything before, by one thread."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %other;
            .reg .b32 %thread;
            mov.u32 %thread, %tid.x;
            setp.ne.u32 %other, %thread, 0;
            @!%other st.release.sys.global.u32 [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [address, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_epoch(address, epoch, word, code, notice_ns):
    """Spin until the 32-bit word has reached the epoch, by one thread. A long wait shows `code` in the watch's word.

    Nothing ends the wait: the watch reports it and ends the process. The code is shown again and again, because another
    program may share the word and clear it. Epochs are compared by their difference, so they may wrap around.
    """
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %other, %arrived, %short, %shown;
            .reg .b32 %thread, %value;
            .reg .b64 %start, %now;
            mov.u32 %thread, %tid.x;
            setp.ne.u32 %other, %thread, 0;
            setp.ne.u32 %shown, 0, 0;
            @%other bra DONE;
            mov.u64 %start, %globaltimer;
        LOOK:
            ld.acquire.sys.global.u32 %value, [$1];
            sub.s32 %value, %value, $2;
            setp.ge.s32 %arrived, %value, 0;
            @%arrived bra ARRIVED;
            mov.u64 %now, %globaltimer;
            sub.u64 %now, %now, %start;
            setp.lt.u64 %short, %now, $5;
            @%short bra LOOK;
            st.relaxed.sys.global.u32 [$3], $4;
            setp.eq.u32 %shown, 0, 0;
            mov.u64 %start, %globaltimer;
            bra LOOK;
        ARRIVED:
            @%shown st.relaxed.sys.global.u32 [$3], 0;
        DONE:
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,l,r,l",
        [address, epoch, word, code, notice_ns],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _put_kernel(
    source,
    bases_W,
    arrived,
    epoch,
    step,
    target,
    size,
    flag,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    copy_to_peers(source, bases_W, step, target, size, RANK, FIRST, SIZE, BLOCK)
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys")
    if before == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        number = tl.load(epoch) + 1
        tl.store(epoch, number)
        for other in tl.static_range(SIZE - 1):
            peer = other + 1 if other >= RANK else other
            store_release(tl.load(bases_W + peer) + flag, number)


@triton.jit
def _wait_kernel(flags_W, epoch, word, code, notice_ns, RANK: tl.constexpr, SIZE: tl.constexpr):
    number = tl.load(epoch)
    for other in tl.static_range(SIZE - 1):
        peer = other + 1 if other >= RANK else other
        wait_for_epoch((flags_W + peer).to(tl.int64), number, word, code + peer, notice_ns.to(tl.int64))
    tl.debug_barrier()


@lru_cache(maxsize=NUM_SHAPES)
def _put(step: int, target: int, size: int, flag: int, rank: int, first: int, num_ranks: int) -> Launch:
    num_programs = min(_MAX_PROGRAMS, divide_up(size * _UNIT.value, _BLOCK) * (num_ranks - 1))
    return Launch(
        _put_kernel,
        (num_programs, 1),
        integers=(step, target, size, flag),
        constants={"RANK": rank, "FIRST": first, "SIZE": num_ranks, "BLOCK": _BLOCK},
    )


@lru_cache(maxsize=NUM_SHAPES)
def _wait(word: int, code: int, rank: int, size: int) -> Launch:
    return Launch(
        _wait_kernel,
        (1, 1),
        integers=(word, code, NOTICE_NS),
        constants={"RANK": rank, "SIZE": size},
        num_warps=1,
    )


def put_slabs(
    source: torch.Tensor,
    bases_W: torch.Tensor,
    arrived: torch.Tensor,
    epoch: torch.Tensor,
    *,
    rank: int,
    first: int,
    step_bytes: int,
    target: int,
    num_bytes: int,
    flag: int,
) -> None:
    """Store a slab of `num_bytes` into every peer's memory and flag it with the next epoch, on the current stream.

    source: int64; the slab for the rank `first`, the lowest peer. Those for other ranks follow in steps of
        `step_bytes`, which is 0 if all get the same one.
    bases_W: int64 [W], the addresses of all ranks' memory. target, flag: byte offsets in it. All bytes but the flag's
        are multiples of `ALIGNMENT`.
    arrived, epoch: int32 [1] each, on this device: 0, and the number of puts so far. Only this kernel writes them.
    """
    assert num_bytes > 0 and all(number % ALIGNMENT == 0 for number in (num_bytes, step_bytes, target))
    step, target, size = (number // ALIGNMENT for number in (step_bytes, target, num_bytes))
    _put(step, target, size, flag, rank, first, bases_W.shape[0])(source, bases_W, arrived, epoch)


def wait_for_slabs(flags_W: torch.Tensor, epoch: torch.Tensor, *, rank: int, word: int, code: int) -> None:
    """Hold the current stream until every peer has flagged this rank's own epoch.

    flags_W: int32 [W], in which each peer writes its place. word: the address of the watch's word, which shows
    `code + peer` while a wait lasts long, and then 0.
    """
    _wait(word, code, rank, flags_W.shape[0])(flags_W, epoch)
