"""The parts of a transport that benchmarks run alone: its computation and its link."""

from __future__ import annotations

import pytest

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("name", ["allgather", "alltoall", "shared-memory", "simulated:alltoall:100MB/s:100us"])
def test_parts_run_alone(name: str) -> None:
    for rank, problems in enumerate(run_ranks("tests.comm.part_checks:check_parts", 2, name, timeout_s=20)):
        assert not problems, f"rank {rank}: {problems}"
