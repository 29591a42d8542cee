"""Ranks on this host: told their place, watched, and ended with all that they started."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from antiphon.launch import LocalLauncher
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("cold_ranks")]

PROGRAM = "tests.launch.rank_programs"


def test_every_rank_is_told_its_place() -> None:
    with LocalLauncher().prepare(2) as ranks:
        ranks.start(PROGRAM, {"DEED": "introduce"})
        assert ranks.wait(30) is None
        assert [ranks.exit_code(rank) for rank in (0, 1)] == [0, 0]
        said = [json.loads((ranks.folder / f"said-{rank}").read_text()) for rank in (0, 1)]
        assert said == [[rank, 2, str(ranks.folder), ranks.front, ranks.meeting] for rank in (0, 1)]
    assert not ranks.folder.exists()


def test_the_first_failure_is_named_and_the_others_are_not_waited_for() -> None:
    start = time.monotonic()
    with LocalLauncher().prepare(2) as ranks:
        ranks.start(PROGRAM, {"DEED": "fail on rank 1"})
        assert ranks.wait(60) == "rank 1 failed first, with exit code 7"
        assert not ranks.ended(0) and ranks.any_ended() and not ranks.killed(1)
        assert ranks.obituary(1, "a test") == (
            f"{ranks.name(1)} ended with code 7 during a test; its last words: a word before the end"
        )
        ranks.end()
        assert ranks.killed(0) and "was killed by SIGKILL during a test" in ranks.obituary(0, "a test")
    assert time.monotonic() - start < 30


def test_what_a_rank_has_started_ends_with_it() -> None:
    with LocalLauncher().prepare(1) as ranks:
        ranks.start(PROGRAM, {"DEED": "start a child"})
        note = ranks.folder / "child"
        wait_until(note.exists, "the child is there")
        child = Path(f"/proc/{note.read_text()}/stat")
        assert child.exists()
    wait_until(
        lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z", "the child is gone"
    )
