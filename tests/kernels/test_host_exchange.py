"""Exchanges through host memory without a GPU: the copies in Triton's interpreter, and the kernel as it compiles.

The interpreter knows no inline assembler, so flags and waits are only looked at in the compiler's output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from antiphon.kernels import slices
from antiphon.kernels.fused import host_exchange
from tests.kernels.test_put import operations


@triton.jit
def _upload_kernel(
    source,
    out,
    step,
    target_step,
    size,
    slice_size,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0)
    number, other = piece // COPIES, piece % COPIES
    host_exchange.upload_piece(source, out, number, other, step, target_step, size, slice_size, RANK, FIRST, BLOCK)


@triton.jit
def _download_kernel(
    bases_W,
    box,
    target,
    target_step,
    size,
    slice_size,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0)
    number, other = piece // (SIZE - 1), piece % (SIZE - 1)
    peer = tl.where(other >= RANK, other + 1, other)
    held = tl.load(bases_W + peer).to(tl.pointer_type(tl.int64)) + (target + RANK * target_step) * 2
    host_exchange.download_piece(held, box, number, other, size, slice_size, RANK, FIRST, BLOCK)


@pytest.mark.parametrize("same_source", [True, False])
@pytest.mark.parametrize("num_bytes", [16, 2048, 2064, 8192, 8208, 40_000])
@pytest.mark.parametrize("size", [2, 3])
def test_all_boxes_hold_the_slabs_of_their_peers_and_nothing_else(size: int, num_bytes: int, same_source: bool) -> None:
    random = torch.Generator().manual_seed(size + num_bytes)
    words, target = num_bytes // 8, 6
    target_step = 0 if same_source else words + 4

    def numbers(count: int) -> torch.Tensor:
        return torch.randint(-(2**62), 2**62, (count,), generator=random)

    slabs = [numbers((1 if same_source else size) * words) for _ in range(size)]
    hosts = [numbers(2 * target + size * (words + 4)) for _ in range(size)]
    boxes = [numbers((size + 1) * words) for _ in range(size)]
    expected = [box.clone() for box in boxes]
    for reader, box in enumerate(expected):
        for sender, slab in enumerate(slabs):
            if reader != sender:
                start = 0 if same_source else reader * words
                box[sender * words : (sender + 1) * words] = slab[start : start + words]
    before = [host.clone() for host in hosts]
    slice_size = slices.slice_bytes(num_bytes, size - 1, 4)
    num_slices = -(-num_bytes // slice_size)
    bases_W = torch.tensor([host.data_ptr() for host in hosts])
    copies = 1 if same_source else size - 1
    for rank in range(size):
        first = min(set(range(size)) - {rank})
        source = slabs[rank] if same_source else slabs[rank][first * words :]
        step = 0 if same_source else num_bytes
        _upload_kernel[(num_slices * copies,)](
            source,
            hosts[rank][target:],
            step // 16,
            target_step // 2,
            num_bytes // 16,
            slice_size // 16,
            RANK=rank,
            FIRST=first,
            COPIES=copies,
            BLOCK=1024,
        )
    for rank in range(size):
        first = min(set(range(size)) - {rank})
        _download_kernel[(num_slices * (size - 1),)](
            bases_W,
            boxes[rank][first * words :],
            target // 2,
            target_step // 2,
            num_bytes // 16,
            slice_size // 16,
            RANK=rank,
            FIRST=first,
            SIZE=size,
            BLOCK=1024,
        )
    for box, wanted in zip(boxes, expected, strict=True):
        assert torch.equal(box, wanted)
    for rank, (host, old) in enumerate(zip(hosts, before, strict=True)):
        for reader in [0] if same_source else sorted(set(range(size)) - {rank}):
            start = target + reader * target_step
            old[start : start + words] = host[start : start + words]
        assert torch.equal(host, old), "something beside the slabs was written"


@pytest.mark.parametrize("num_programs", [1, 3, 8, 64])
@pytest.mark.parametrize("num_peers", [1, 3, 7])
def test_slices_cover_a_slab_and_are_never_too_many(num_peers: int, num_programs: int) -> None:
    for num_bytes in (16, 2048, 2064, 4192, 65_536, 65_552, 1_073_152, slices.LARGEST_SLAB):
        size = slices.slice_bytes(num_bytes, num_peers, num_programs)
        assert size % slices.ALIGNMENT == 0 and 2048 <= size <= slices.LARGEST_SLICE
        assert -(-num_bytes // size) <= slices.MAX_SLICES
        if size > 2048 and size < slices.LARGEST_SLICE:
            assert -(-num_bytes // size) * num_peers <= num_programs + num_peers


def test_all_programs_have_a_piece_at_first_and_a_launch_is_kept() -> None:
    launched: list[tuple[int, ...]] = []

    class Launch:
        def __init__(self, kernel: object, grid: tuple[int, int], *, integers: tuple[int, ...], constants: object):
            self._made = (*grid, *integers)

        def __call__(self, *tensors: torch.Tensor) -> None:
            launched.append(self._made)

    def exchange(num_bytes: int, same_source: bool, code: int) -> tuple[int, ...]:
        host_exchange.exchange_slabs(
            *[torch.zeros(4, dtype=torch.int64)] * 5,
            rank=1,
            first=0,
            num_bytes=num_bytes,
            same_source=same_source,
            target=64,
            target_step=4096,
            flag=12,
            word=1 << 40,
            code=code,
            num_programs=8,
        )
        return launched.pop()

    host_exchange._exchange.cache_clear()
    with patch.object(host_exchange, "Launch", Launch):
        assert exchange(4096, True, 64) == (2 + 6, 1, 0, 4, 256, 256, 128, 12, 2, 1 << 40, 64, 200_000_000)
        assert exchange(4096, False, 64) == (6 + 6, 1, 256, 4, 256, 256, 128, 12, 6, 1 << 40, 64, 200_000_000)
        assert exchange(1 << 20, False, 128)[0] == 8 + 8
        exchange(4096, True, 64)
        assert host_exchange._exchange.cache_info().hits == 1
        with pytest.raises(AssertionError):
            exchange(4100, True, 64)
    host_exchange._exchange.cache_clear()


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.host_exchange_checks"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, str] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_flags_stand_between_the_copies(ptx: dict[str, str], size: int, same: bool) -> None:
    """In the order of the code: upload, barrier, release; acquire, barrier, download past all caches."""
    found = operations(ptx[f"{size} {same}"])
    wide = [number for number, name in enumerate(found) if name == "st.global.v2.b64"]
    released = [number for number, name in enumerate(found) if name == "st.release.sys.global.u32"]
    acquired = found.index("ld.acquire.sys.global.u32")
    volatile = [number for number, name in enumerate(found) if name == "ld.volatile.global.v2.b64"]
    uploads, downloads = wide[:4], wide[4:]
    assert len(uploads) == len(downloads) == len(volatile) == 4, "a slice is 4 accesses of 16 bytes for each thread"
    assert len(released) == (size - 1 if same else 1)
    assert "bar.sync" in found[max(uploads) : min(released)]
    assert max(released) < acquired
    assert "bar.sync" in found[acquired : min(volatile)]
    assert max(volatile) < min(downloads)
    counts = [number for number, name in enumerate(found) if name == "st.global.b32"]
    assert max(released) < counts[0] < acquired and counts[1] > max(downloads), "epochs are counted last"
