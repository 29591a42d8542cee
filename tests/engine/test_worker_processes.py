"""The processes of the workers at their end, whatever state they and their files are in."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from antiphon.config.engine_config import EngineConfig
from antiphon.engine.worker import WorkerStart
from antiphon.frontend.worker_processes import WorkerProcesses


@pytest.fixture
def workers() -> Iterator[WorkerProcesses]:
    workers = WorkerProcesses(WorkerStart(options=EngineConfig(ranks=1), eos_token_ids=(2,), matched=None))
    try:
        yield workers
    finally:
        workers.close(patience_s=0)


def test_an_obituary_needs_no_log(workers: WorkerProcesses) -> None:
    """Somebody may have tidied up the folder of a server that is up for weeks."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    workers._processes.append(process)
    process.wait()
    assert workers.obituary(0, "a test") == f"rank 0 (pid {process.pid}) ended with code 3 during a test"


def test_last_words_are_a_whole_line(workers: WorkerProcesses) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    workers._processes.append(process)
    process.wait()
    log = "Traceback:\r\nOSError: no file a\u2028b\x85c\r\n2026 INFO ended\n\n"
    workers._log(0).write_text(log, encoding="utf-8", newline="")
    assert workers.obituary(0, "a test").endswith("; its last words: OSError: no file a\u2028b\x85c")


class NeverEnds:
    """A process that waits for a device, and that the system cannot end."""

    pid = 77
    stdin = None
    killed = False

    def poll(self) -> None:
        return None

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "for ever"
        raise subprocess.TimeoutExpired("it", timeout)


def test_a_process_that_cannot_be_killed_keeps_nobody(
    workers: WorkerProcesses, caplog: pytest.LogCaptureFixture
) -> None:
    process: Any = NeverEnds()
    workers._processes.append(process)
    start_s = time.monotonic()
    with caplog.at_level(logging.ERROR, "antiphon.engine"):
        workers.close(patience_s=0)
    assert time.monotonic() - start_s < 10
    assert process.killed and "rank 0 (pid 77) was killed" in caplog.text
    workers._processes.clear()
