"""The contract of all transports of CUDA devices, on two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.comm.contract_checks import transports_of
from tests.support.happens_before import check
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize(
    ("kind", "transport"), [(kind, name) for kind in ("cuda", "generic:cuda") for name in transports_of(2, kind)]
)
def test_contract_on_two_devices(kind: str, transport: str, tmp_path: Path) -> None:
    by_rank = run_ranks(
        "tests.comm.rank_checks:run_checks", 2, str(tmp_path), kind, transport, timeout_s=20, limit_s=300
    )
    problems = [f"rank {rank}: {name}: {said}" for rank, by in enumerate(by_rank) for name, said in by.items() if said]
    assert not problems, "\n".join(problems)
    assert len(by_rank[0]) > 40


@pytest.mark.parametrize("transport", transports_of(2, "cuda"))
def test_10_000_iterations_of_changing_sizes(transport: str) -> None:
    problems = run_ranks("tests.comm.gpu_checks:many_iterations", 2, transport, 10_000, timeout_s=20, limit_s=300)
    assert problems == ["", ""]


@pytest.mark.parametrize("transport", ["host-staged", "one-sided"])
def test_2000_small_exchanges_by_kernel(transport: str) -> None:
    problems = run_ranks("tests.comm.gpu_checks:small_exchanges", 2, transport, 2000, timeout_s=20, limit_s=300)
    assert problems == ["", ""]


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("transport", ["local", "copy-engine", "host-staged", "one-sided", "allgather"])
def test_replays_give_what_eager_steps_give(transport: str, num_lanes: int) -> None:
    size = 1 if transport == "local" else 2
    check_name = "tests.comm.gpu_checks:replays_between_eager_steps"
    problems = run_ranks(check_name, size, transport, 50, num_lanes, timeout_s=20, limit_s=300)
    assert problems == [""] * size


@pytest.mark.parametrize("transport", ["copy-engine", "host-staged"])
def test_logs_of_two_devices_are_clean(transport: str) -> None:
    logs = run_ranks("tests.comm.gpu_checks:logs_of_two_lanes", 2, transport, timeout_s=20)
    assert check(logs) == []
    copies = {"put"} if transport == "copy-engine" else {"upload", "download"}
    for log in logs:
        assert {event.operation for event in log} >= copies | {"pack", "experts", "signal", "wait", "local sum"}
        assert {event.stream for event in log} == {"compute"} | (
            {"comm"} if transport == "copy-engine" else {"up", "down"}
        )
    if transport == "host-staged":
        assert any("flag 3 " in event.place for event in logs[0]), "no slab went in several chunks"
