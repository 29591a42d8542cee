"""The device watch without a device: the tests write the words that streams would write."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, clock: Clock, **options: Any) -> Iterator[tuple[DeviceWatch, list[int]]]:
    """A watch with a limit of 2 s by this clock, and the exit codes with which it would have ended the process."""
    ends: list[int] = []
    monkeypatch.setattr(device_watch, "time", clock)
    monkeypatch.setattr(device_watch, "_PERIOD_S", 0.01)
    monkeypatch.setattr(os, "_exit", ends.append)
    watch = DeviceWatch(rank=0, timeout_s=2.0, pin_memory=False, **options)
    try:
        yield watch, ends
    finally:
        watch._values[:] = 0
        watch.close()


def pass_time(clock: Clock, seconds: float, ends: Sequence[int] = ()) -> None:
    """Let the watch see the words at this time, and again `seconds` later. It looks no more once it has reported.

    ends: where its report shows, if one may come.
    """
    for later in (seconds, 0.0):
        before = clock.num_looks
        wait_until(lambda seen=before + 2: clock.num_looks >= seen or bool(ends), "a whole round of the watch")
        clock.now_s += later


def test_waits_that_go_on_are_no_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is shorter than the limit and all together are longer. The board shows each wait and the last one's end."""
    clock = Clock()
    board = ProgressBoard(tmp_path / "board", size=2)
    with watched(monkeypatch, clock, board=board) as (watch, ends):
        word = watch.word("comm")
        for layer in range(4):
            place = f"waiting on its device for dispatch layer {layer} from its peers"
            watch._values[0] = word.code(f"dispatch layer {layer}") + ALL_PEERS
            pass_time(clock, 0.9)
            wait_until(lambda place=place: place in board.describe(), place)
        watch._values[0] = 0
        wait_until(lambda: "was last computing" in board.describe(), "the end of the wait")
    assert not ends


LABEL = "combine layer 7, lane 1"


def test_replays_with_the_same_code_are_no_alarm_as_long_as_they_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch finds the same captured wait at each look, in another replay each time, until a replay stops."""
    clock, streams = Clock(), []
    said: list[str] = []

    class Write:
        """Stands in for `StreamOperations`, and runs at once."""

        def __init__(self, *, flush: bool) -> None:
            self.value = 0

        def write(self, address: int, value: int) -> int:
            assert address == int(watch._epoch.ctypes.data)
            return 0

        def set_value(self, number: int, value: int) -> None:
            self.value = value

        def queue(self, stream: int) -> None:
            streams.append(stream)
            watch._epoch[0] = self.value

    monkeypatch.setattr(device_watch, "StreamOperations", Write)
    with watched(monkeypatch, clock, on_stuck=said.append) as (watch, ends):
        word = watch.word("compute")
        value = word.code(LABEL, captured=True) + 3
        for _ in range(8):
            watch.next_epoch(77)
            watch._values[0] = word.code(LABEL, captured=True) + 3
            pass_time(clock, 0.9)
        assert watch._values[0] == value
        assert not ends and not said
        assert streams == [77] * 8
        pass_time(clock, 2.2, ends)
        wait_until(lambda: bool(ends), "the report")
    assert ends == [1]
    assert re.match(rf"rank 0 timed out after .* waiting on its device for {LABEL} from rank 3", said[0])


def test_the_same_code_would_be_an_alarm_without_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with watched(monkeypatch, clock) as (watch, ends):
        word = watch.word("compute")
        for _ in range(4):
            watch._values[0] = word.code(LABEL, captured=True)
            pass_time(clock, 0.9, ends)
        wait_until(lambda: bool(ends), "the report")


def test_captured_codes_stay_and_differ_from_eager_ones() -> None:
    watch = DeviceWatch(rank=0, timeout_s=1.0, pin_memory=False)
    word = watch.word("compute")
    watch.close()
    labels = [
        f"{phase} layer {n}, lane {lane}" for phase in ("dispatch", "combine") for n in range(96) for lane in (0, 1)
    ]
    codes = [word.code(label, captured=True) for label in labels]
    for _ in range(5000):  # more than eager labels are kept
        eager = word.code("an eager wait")
        assert eager not in codes
    assert [word.code(label, captured=True) for label in labels] == codes
    assert len(set(codes)) == len(labels)
    assert [word.explain(code + 1) for code in codes] == [(label, "rank 1") for label in labels]


def test_captured_labels_beyond_the_table_share_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_watch, "_CAPTURED_LABELS", 3)
    word = DeviceWatch(rank=0, timeout_s=1.0, pin_memory=False).word("compute")
    codes = [word.code(f"layer {number}", captured=True) for number in range(5)]
    assert len(set(codes)) == 4 and codes[3] == codes[4]
    assert [word.explain(code)[0] for code in codes[:4]] == [
        "layer 0",
        "layer 1",
        "layer 2",
        "an exchange of a captured step",
    ]
    assert word.code("layer 1", captured=True) == codes[1]


def test_codes_start_again_before_they_grow_out_of_a_word() -> None:
    word = DeviceWatch(rank=0, timeout_s=1.0, pin_memory=False).word("down")
    word._number = 2**24 - 1
    last, first = word.code("last"), word.code("first")
    assert 0 < first < last < word.code("captured", captured=True) < 2**31 - ALL_PEERS
    assert word.explain(first + 5) == ("first", "rank 5")
