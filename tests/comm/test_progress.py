"""The progress board: what it says about ranks that run, have ended, are stopped or never started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from antiphon.comm import ProgressBoard


@pytest.fixture
def board(tmp_path: Path) -> ProgressBoard:
    return ProgressBoard(tmp_path / "board", size=3)


def mark_as(board: ProgressBoard, rank: int, pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid)
        board.mark(rank, "waiting for combine layer 3, lane 1")


def test_a_rank_that_never_came(board: ProgressBoard) -> None:
    assert board.describe() == "rank 0 never started; rank 1 never started; rank 2 never started"
    assert board.describe(except_rank=1) == "rank 0 never started; rank 2 never started"


def test_a_rank_that_runs(board: ProgressBoard) -> None:
    board.mark(1, "loading the model")
    time.sleep(0.11)
    text = board.describe()
    said = re.search(rf"rank 1 \(pid {os.getpid()}, running\) was last loading the model, (\d+\.\d) s ago", text)
    assert said is not None, text
    assert 0.1 <= float(said[1]) < 5


def test_a_mark_replaces_the_one_before(board: ProgressBoard) -> None:
    board.mark(0, "a long description of where this rank has been all the time")
    board.mark(0, "ready")
    assert "was last ready, " in board.describe()


def test_long_marks_are_cut(board: ProgressBoard) -> None:
    board.mark(0, "x" * 5000)
    board.mark(1, "é" * 5000)
    assert "rank 2 never started" in board.describe()
    assert "rank 0 (pid" in board.describe()
    assert "rank 1 (pid" in board.describe()


def test_all_who_open_the_file_see_the_same(board: ProgressBoard, tmp_path: Path) -> None:
    board.mark(2, "computing")
    again = ProgressBoard(tmp_path / "board", size=3)
    assert "rank 2 (pid" in again.describe()
    again.mark(0, "ready")
    assert "was last ready" in board.describe()


@pytest.mark.processes
def test_ended_and_stopped_processes(board: ProgressBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        mark_as(board, 0, process.pid, monkeypatch)
        process.send_signal(signal.SIGSTOP)
        wait_for_text(board, f"rank 0 (pid {process.pid}, stopped) was last waiting for combine layer 3, lane 1")
        process.kill()
        wait_for_text(board, f"rank 0 (pid {process.pid}, ended)")
    finally:
        process.kill()
        process.communicate()
    assert f"rank 0 (pid {process.pid}, ended)" in board.describe()


def wait_for_text(board: ProgressBoard, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in board.describe() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert text in board.describe()
