"""The contract of all transports of CUDA devices, on two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.comm.contract_checks import transports_of
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("transport", transports_of(2, "cuda"))
def test_contract_on_two_devices(transport: str, tmp_path: Path) -> None:
    by_rank = run_ranks(
        "tests.comm.rank_checks:run_checks", 2, str(tmp_path), "cuda", transport, timeout_s=20, limit_s=300
    )
    problems = [f"rank {rank}: {name}: {said}" for rank, by in enumerate(by_rank) for name, said in by.items() if said]
    assert not problems, "\n".join(problems)
    assert len(by_rank[0]) > 40


@pytest.mark.parametrize("transport", transports_of(2, "cuda"))
def test_10_000_iterations_of_changing_sizes(transport: str) -> None:
    problems = run_ranks("tests.comm.gpu_checks:many_iterations", 2, transport, 10_000, timeout_s=20, limit_s=300)
    assert problems == ["", ""]
