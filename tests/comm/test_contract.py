"""One contract for all transports and world sizes. One set of processes per world size runs every check."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comm.rank_checks import checks_of
from tests.support.ranks import run_ranks

WORLD_SIZES = (1, 2, 4)

pytestmark = pytest.mark.processes


class Outcomes:
    """Outcomes of all checks, by world size; the processes start when the first one of a size is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_size: dict[int, list[dict[str, str]] | Exception] = {}

    def problems(self, size: int, check: str) -> list[str]:
        by_rank = self._by_size.get(size) or self._run(size)
        if isinstance(by_rank, Exception):
            raise by_rank
        return [f"rank {rank}: {outcomes[check]}" for rank, outcomes in enumerate(by_rank) if outcomes[check]]

    def _run(self, size: int) -> list[dict[str, str]] | Exception:
        folder = self._folder / str(size)
        folder.mkdir()
        try:
            self._by_size[size] = run_ranks("tests.comm.rank_checks:run_checks", size, str(folder), timeout_s=20)
        except Exception as error:
            self._by_size[size] = error
        return self._by_size[size]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tmp_path_factory.mktemp("contract"))


CASES = [pytest.param(size, check, id=f"{size}-{check}") for size in WORLD_SIZES for check in checks_of(size)]


@pytest.mark.parametrize(("size", "check"), CASES)
def test_contract(outcomes: Outcomes, size: int, check: str) -> None:
    problems = outcomes.problems(size, check)
    assert not problems, "\n".join(problems)


def test_contract_of_transports_that_a_device_queues(tmp_path: Path) -> None:
    by_rank = run_ranks("tests.comm.rank_checks:run_checks", 2, str(tmp_path), "generic:cpu", timeout_s=20)
    problems = [f"rank {rank}: {name}: {said}" for rank, by in enumerate(by_rank) for name, said in by.items() if said]
    assert not problems, "\n".join(problems)
    assert set(by_rank[0]) == set(checks_of(2, "generic:cpu"))
