"""One-sided exchanges without a GPU: the copies in Triton's interpreter, and both kernels as they compile.

The interpreter knows no inline assembler, so flags and waits are only looked at in the compiler's output.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from antiphon.kernels.fused import put


@triton.jit
def _copies_kernel(
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
    put.copy_to_peers(source, bases_W, step, target, size, RANK, FIRST, SIZE, BLOCK)


def copied(
    memories: list[torch.Tensor], sources: torch.Tensor, *, rank: int, step: int, target: int, words: int
) -> list[torch.Tensor]:
    """The plain twin: what every rank's memory holds afterwards."""
    peers = [peer for peer in range(len(memories)) if peer != rank]
    after = [memory.clone() for memory in memories]
    for peer in peers:
        start = (peer - peers[0]) * step
        after[peer][target : target + words] = sources[start : start + words]
    return after


@pytest.mark.parametrize("num_programs", [1, 3, 32])
@pytest.mark.parametrize("same_source", [True, False])
@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 1), (4, 3)])
def test_every_peer_gets_its_slab_and_nothing_else(size: int, rank: int, same_source: bool, num_programs: int) -> None:
    random = torch.Generator().manual_seed(size + rank)
    words, target = 1234, 56

    def numbers(count: int) -> torch.Tensor:
        return torch.randint(-(2**62), 2**62, (count,), generator=random)

    memories, sources = [numbers(2000) for _ in range(size)], numbers(size * words)
    step = 0 if same_source else words
    expected = copied(memories, sources, rank=rank, step=step, target=target, words=words)
    bases_W = torch.tensor([memory.data_ptr() for memory in memories])
    first = min(set(range(size)) - {rank})
    _copies_kernel[(num_programs,)](
        sources, bases_W, step // 2, target // 2, words // 2, RANK=rank, FIRST=first, SIZE=size, BLOCK=512
    )
    for memory, wanted in zip(memories, expected, strict=True):
        assert torch.equal(memory, wanted)


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.put_checks"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, str] = json.loads(ran.stdout)
    return found


def operations(ptx: str) -> list[str]:
    """Barriers, and accesses of global memory, in order."""
    return re.findall(r"\b(bar\.sync|(?:st|ld|atom)\.(?:[a-z]+\.)*global[.a-z0-9_]*)", ptx)


@pytest.mark.parametrize("size", [2, 4])
def test_a_flag_is_a_release_after_a_barrier_and_an_acquiring_count(ptx: dict[str, str], size: int) -> None:
    found = operations(ptx[f"put {size}"])
    copies = [number for number, name in enumerate(found) if name == "st.global.v2.b64"]
    count = found.index("atom.global.sys.acq_rel.add.u32")
    releases = [number for number, name in enumerate(found) if name == "st.release.sys.global.u32"]
    assert copies, "the copies are not 16 bytes wide"
    assert max(copies) < found.index("bar.sync") < count < min(releases)
    assert "bar.sync" in found[count : min(releases)], "other threads must not be ahead of the count"
    assert len(releases) == size - 1


@pytest.mark.parametrize("size", [2, 4])
def test_a_wait_acquires_every_flag_before_its_last_barrier(ptx: dict[str, str], size: int) -> None:
    found: list[Any] = operations(ptx[f"wait {size}"])
    assert found.count("ld.acquire.sys.global.u32") == size - 1
    assert found.count("st.relaxed.sys.global.u32") == 2 * (size - 1), (
        "it tells the watch when it is late, and when not"
    )
    assert found[-1] == "bar.sync"
    assert ptx[f"wait {size}"].count("%globaltimer") == 3 * (size - 1)
