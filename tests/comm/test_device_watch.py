"""The device watch without a device: the tests write the words that streams would write."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from antiphon.comm import ProgressBoard, device_watch
from antiphon.comm.device_watch import ALL_PEERS, DeviceWatch
from tests.support.waiting import wait_until

STUCK = """
import pathlib, sys, time
from antiphon.comm import ProgressBoard
from antiphon.comm.device_watch import DeviceWatch
folder = pathlib.Path(sys.argv[1])
board = ProgressBoard(folder / "board", size=2)
if sys.argv[2] == "torn":
    board._map[256:266] = b"no numbers"
watch = DeviceWatch(rank=0, timeout_s=0.5, board=board, on_stuck=(folder / "report").write_text, pin_memory=False)
word = watch.word("compute")
watch._values[0] = word.code("combine layer 3, lane 1") + 1
if sys.argv[2] == "closed":
    watch.close()
time.sleep(30)
"""


def run_stuck(folder: Path, row: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STUCK, str(folder), row]
    return subprocess.run(command, capture_output=True, text=True, timeout=25, check=False)


@pytest.mark.parametrize("row", ["empty", "closed"])
def test_a_wait_that_never_ends_is_reported_and_ends_the_process(tmp_path: Path, row: str) -> None:
    """closed: work abandoned at shutdown may still wait."""
    ended = run_stuck(tmp_path, row)
    said = (tmp_path / "report").read_text()
    assert ended.returncode == 1
    waited = re.match(r"rank 0 .* (\d+\.\d) s ", said)
    assert waited is not None and float(waited[1]) >= 0.5
    for name in ("device", "combine layer 3, lane 1 from rank 1", "rank 1 never started"):
        assert name in said
    assert f"error: {said}" in ended.stderr


def test_a_board_that_cannot_be_read_does_not_keep_the_process(tmp_path: Path) -> None:
    assert run_stuck(tmp_path, "torn").returncode == 1


class Clock:
    """The clock of the watch, which reads it once per round, before it reads the words."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_looks = 0

    def monotonic(self) -> float:
        self.num_looks += 1
        return self.now_s


def test_waits_that_go_on_are_no_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is shorter than the limit and all together are longer. The board shows each wait and the last one's end."""
    clock = Clock()
    ends: list[int] = []
    monkeypatch.setattr(device_watch, "time", clock)
    monkeypatch.setattr(device_watch, "_PERIOD_S", 0.01)
    monkeypatch.setattr(os, "_exit", ends.append)
    board = ProgressBoard(tmp_path / "board", size=2)
    watch = DeviceWatch(rank=0, timeout_s=2.0, board=board, pin_memory=False)
    word = watch.word("comm")
    try:
        for layer in range(4):
            place = f"waiting on its device for dispatch layer {layer} from its peers"
            watch._values[0] = word.code(f"dispatch layer {layer}") + ALL_PEERS
            before = clock.num_looks
            wait_until(lambda seen=before + 2: clock.num_looks >= seen, "a whole round of the watch")
            clock.now_s += 0.9
            wait_until(lambda place=place: place in board.describe(), place)
        watch._values[0] = 0
        wait_until(lambda: "was last computing" in board.describe(), "the end of the wait")
    finally:
        watch.close()
    assert not ends


def test_codes_start_again_before_they_grow_out_of_a_word() -> None:
    word = DeviceWatch(rank=0, timeout_s=1.0, pin_memory=False).word("down")
    word._number = 2**24 - 1
    last, first = word.code("last"), word.code("first")
    assert 0 < first < last < 2**31 - ALL_PEERS
    assert word.explain(first + 5) == ("first", "rank 5")
