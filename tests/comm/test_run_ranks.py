"""`tests.support.ranks`: failures show the traceback of the rank, and no process survives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.ranks import RanksError, run_ranks

pytestmark = pytest.mark.processes


def test_results_come_home_in_order_of_rank() -> None:
    assert run_ranks("tests.comm.runner_checks:introduce", 2, "hello", connect=False) == [
        (0, 2, "hello"),
        (1, 2, "hello"),
    ]


def test_a_failure_shows_its_traceback_and_ends_the_others(tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    start = time.monotonic()
    with pytest.raises(RanksError) as failed:
        run_ranks("tests.comm.runner_checks:fail_on_rank_one", 2, str(pids), connect=False)
    assert time.monotonic() - start < 60
    message = str(failed.value)
    assert "rank 1 failed first" in message
    assert "KeyError: 'broken on purpose'" in message
    assert "fail_on_rank_one" in message
    assert "a word before the end" in message
    assert not Path(f"/proc/{pids.read_text()}").exists()


def test_a_rank_that_never_ends_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    with pytest.raises(RanksError, match=r"\[0\].*\b3 s"):
        run_ranks("tests.comm.runner_checks:sleep_forever", 1, str(pids), connect=False, limit_s=3.0)
    assert not Path(f"/proc/{pids.read_text()}").exists()
