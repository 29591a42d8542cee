"""Which worker processes this test process has."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.support.warm_ranks import warm_pids

__all__ = ["assert_no_new_workers", "worker_pids"]


def worker_pids(parent: int | None = None) -> dict[int, int]:
    """Pid by rank number in the command line, of running workers whose parent is this process."""
    parent = os.getpid() if parent is None else parent
    found = warm_pids() if parent == os.getpid() else {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if b"antiphon.engine.worker" in words and int(fields[1]) == parent and fields[0] != "Z":
            found[int(folder.name)] = int(words[words.index(b"--rank") + 1])
    return found


def assert_no_new_workers(before: dict[int, int]) -> None:
    """Fail if a worker is left that was not there before; gives the system a second."""
    deadline = time.monotonic() + 1
    while (left := worker_pids().keys() - before.keys()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"workers {sorted(left)} are left behind"
