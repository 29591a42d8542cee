"""Missing, silent or ended peers: a timely error names the rank and what it did last."""

from __future__ import annotations

import re

import pytest

from tests.comm.peer_checks import Failure
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Failure]]:
    return run_ranks("tests.comm.peer_checks:misbehave", 2, connect=False)


def test_a_rank_that_never_comes_is_named(by_rank: list[dict[str, Failure]]) -> None:
    failure = by_rank[0]["absent"]
    assert 1.5 < failure.after_s < 12  # the limit is 2 s
    assert failure.message.startswith("rank 0 ")
    assert "rank 1 never started" in failure.message


@pytest.mark.parametrize(("case", "place"), [("silent", "dispatch layer 3"), ("silent agreement", "agreement")])
def test_a_silent_rank_is_named_with_its_last_place(by_rank: list[dict[str, Failure]], case: str, place: str) -> None:
    failure, pid = by_rank[0][case], by_rank[1][case].pid
    assert 1.5 < failure.after_s < 12
    assert re.search(r" [2-9]\.\d s", failure.message) and place in failure.message
    assert f"rank 1 (pid {pid}, running) was last thinking" in failure.message


def test_a_rank_that_ends_is_noticed_at_once(by_rank: list[dict[str, Failure]]) -> None:
    failure = by_rank[0]["ended"]
    assert failure.after_s < 20
    assert failure.message.startswith("rank 0 ") and "dispatch layer 3" in failure.message
    assert f"rank 1 (pid {by_rank[1]['ended'].pid}, " in failure.message
