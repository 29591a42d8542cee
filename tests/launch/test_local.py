"""Ranks on this host at their end, whatever state they and their files are in."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from antiphon.launch import LocalLauncher
from antiphon.launch.local import LocalRanks

pytestmark = pytest.mark.usefixtures("cold_ranks")


@pytest.fixture
def ranks(cold_ranks: None) -> Iterator[LocalRanks]:
    with LocalLauncher().prepare(1) as ranks:
        yield ranks


def test_an_obituary_needs_no_log(ranks: LocalRanks) -> None:
    """Somebody may have tidied up the folder of a server that is up for weeks."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    ranks._processes.append(process)
    process.wait()
    assert ranks.obituary(0, "a test") == f"rank 0 (pid {process.pid}) ended with code 3 during a test"


def test_last_words_are_a_whole_line(ranks: LocalRanks) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    ranks._processes.append(process)
    process.wait()
    log = "Traceback:\r\nOSError: no file a\u2028b\x85c\r\n2026 INFO ended\n\n"
    ranks._log(0).write_text(log, encoding="utf-8", newline="")
    assert ranks.obituary(0, "a test").endswith("; its last words: OSError: no file a\u2028b\x85c")


class NeverEnds:
    """A process that waits for a device, and that the system cannot end."""

    pid = 77
    stdin = None

    def poll(self) -> None:
        return None

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "for ever"
        raise subprocess.TimeoutExpired("it", timeout)


def test_a_process_that_cannot_be_killed_keeps_nobody(
    ranks: LocalRanks, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda *call: killed.append(call))
    process: Any = NeverEnds()
    ranks._processes.append(process)
    start_s = time.monotonic()
    with caplog.at_level(logging.ERROR, "antiphon.launch"):
        ranks.close(patience_s=0)
    assert time.monotonic() - start_s < 10
    assert killed == [(77, signal.SIGKILL)] and "rank 0 (pid 77) was killed" in caplog.text
    assert not ranks.folder.exists()
