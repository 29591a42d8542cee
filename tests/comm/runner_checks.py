"""Functions that `test_run_ranks` runs on ranks. They do not import torch, so that they start quickly."""

from __future__ import annotations

import os
import sys
import time

from tests.support.ranks import Meeting


def introduce(meeting: Meeting, greeting: str) -> tuple[int, int, str]:
    return meeting.rank, meeting.size, greeting


def fail_on_rank_one(meeting: Meeting, pids: str) -> None:
    """Rank 0 writes down its process id and sleeps forever."""
    if meeting.rank == 1:
        while not os.path.exists(pids):  # noqa: PTH110 (no import worth its time)
            time.sleep(0.01)
        print("a word before the end", file=sys.stderr)
        raise KeyError("broken on purpose")
    _note_pid(pids)
    time.sleep(1000)


def sleep_forever(meeting: Meeting, pids: str) -> None:
    _note_pid(pids)
    time.sleep(1000)


def _note_pid(path: str) -> None:
    with open(path + ".new", "w") as file:  # noqa: PTH123
        file.write(str(os.getpid()))
    os.rename(path + ".new", path)  # noqa: PTH104
