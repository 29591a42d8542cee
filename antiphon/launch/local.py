"""Runs ranks on this host as child processes that connect through a private folder."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from antiphon.core.folders import socket_folder
from antiphon.launch.base import Launcher, RankProcesses

logger = logging.getLogger("antiphon.launch")

_KILLED_S = 5.0  # time for the OS to end a killed process; one blocked on a device or a disk may never end


class LocalLauncher(Launcher):
    """Starts every rank as a child of this process, on this host."""

    def prepare(self, size: int, *, prefix: str = "antiphon-") -> LocalRanks:
        return LocalRanks(size, prefix)


class LocalRanks(RankProcesses):
    """Ranks as child processes. The folder has the sockets, the meeting file and the output of each rank."""

    def __init__(self, size: int, prefix: str) -> None:
        folder = socket_folder(prefix)
        super().__init__(
            size=size, folder=folder, front=f"ipc://{folder / 'front.sock'}", meeting=f"file://{folder / 'meeting'}"
        )
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, module: str, environment: Mapping[str, str] | None = None, *, show_stderr_of_rank_0: bool = False
    ) -> None:
        merged = _environment() | dict(environment or {})
        for rank in range(self.size):
            show_stderr = show_stderr_of_rank_0 and rank == 0
            with self._log(rank).open("wb") as log:
                self._processes.append(self._start(rank, module, merged, log, show_stderr=show_stderr))

    def _start(
        self, rank: int, module: str, environment: dict[str, str], log: IO[bytes], *, show_stderr: bool
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # -P: modules in the current folder must not shadow those of the library.
            [sys.executable, "-P", "-m", module, *self.place(rank).arguments()],
            stdin=subprocess.PIPE,  # closes when this process ends, and the rank with it
            stdout=log,
            stderr=None if show_stderr else log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process only
        )

    def exit_code(self, rank: int) -> int | None:
        return self._processes[rank].poll()

    def name(self, rank: int) -> str:
        return f"rank {rank} (pid {self._processes[rank].pid})"

    def output(self, rank: int) -> str:
        try:
            return self._log(rank).read_text(errors="replace")
        except OSError:  # the folder was removed
            return ""

    def end(self, *, patience_s: float = 0.0) -> None:
        """See `RankProcesses.end`. A killed process that the OS does not end in time is logged and left."""
        try:
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
                time.sleep(0.01)
        finally:
            for process in self._processes:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # the whole session, including child processes of the rank
            deadline = time.monotonic() + _KILLED_S
            for rank, process in enumerate(self._processes):
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    logger.error("rank %d (pid %d) was killed, but has not ended", rank, process.pid)
                if process.stdin is not None:
                    process.stdin.close()

    def close(self, *, patience_s: float = 0.0) -> None:
        super().close(patience_s=patience_s)
        self._processes.clear()

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"


def _environment() -> dict[str, str]:
    """The environment variables for ranks that all run on this host."""
    environment = dict(os.environ)
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    # NVLink multicast needs permissions that a shared host may not grant, and none of our transports uses it.
    environment.setdefault("NCCL_NVLS_ENABLE", "0")
    environment.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    # Ranks import modules from where this process does, including the folder of a notebook or script.
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return environment
