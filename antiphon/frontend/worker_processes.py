"""The worker processes of an engine, and the private folder by which they and the front find each other."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from antiphon.comm import ProgressBoard
from antiphon.config.engine_config import EngineConfig
from antiphon.core.folders import socket_folder
from antiphon.core.lines import split_lines
from antiphon.engine.messages import Failed
from antiphon.engine.worker import OPTIONS_FILE, PROGRESS_FILE, SOCKET_FILE, WorkerStart, read_report

logger = logging.getLogger("antiphon.engine")

_KILLED_S = 5.0  # the system's time to end a killed process; one that waits for a device or a disk can take for ever


class WorkerProcesses:
    """One process a rank. The folder holds their options, socket, logs, reports and progress board.

    board: what each rank was doing last.
    """

    def __init__(self, start: WorkerStart) -> None:
        """Makes the folder; `start` starts the processes."""
        options = start.options
        self._environment = _environment(options)
        self._folder = socket_folder("antiphon-")
        self._size = options.ranks
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self.board = ProgressBoard(self._folder / PROGRESS_FILE, size=options.ranks)
            (self._folder / OPTIONS_FILE).write_bytes(msgspec.json.encode(start))
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    @property
    def address(self) -> str:
        """Where the workers look for the front's socket."""
        return f"ipc://{self._folder / SOCKET_FILE}"

    def start(self) -> None:
        for rank in range(self._size):
            self._processes.append(self._start(rank))

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        # -P: modules of the current folder must not hide those of the library.
        command = [sys.executable, "-P", "-m", "antiphon.engine.worker", "--rank", str(rank)]
        command += ["--folder", str(self._folder)]
        with self._log(rank).open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closes when this process ends, and the worker with it
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches this process only
            )

    def ended(self, rank: int) -> bool:
        return self._processes[rank].poll() is not None

    def killed(self, rank: int) -> bool:
        """By a signal."""
        code = self._processes[rank].poll()
        return code is not None and code < 0

    def any_ended(self) -> bool:
        return any(process.poll() is not None for process in self._processes)

    def obituary(self, rank: int, what: str) -> str:
        """How a rank ended that has ended. what: during which work."""
        process = self._processes[rank]
        who, code = f"rank {rank} (pid {process.pid})", process.returncode
        if code >= 0:
            return f"{who} ended with code {code} during {what}{self._last_words(rank)}"
        name = signal.Signals(-code).name
        cause = " (lack of memory is a usual cause)" if name == "SIGKILL" else self._last_words(rank)
        return f"{who} was killed by {name} during {what}{cause}"

    def reports(self) -> dict[int, Failed]:
        """What ranks left in the folder that could not send it any more."""
        found = {rank: read_report(rank, self._folder) for rank in range(self._size)}
        return {rank: report for rank, report in found.items() if report is not None}

    def close(self, *, patience_s: float) -> None:
        """Wait so long for the processes to end by themselves, kill those that do not, and remove the folder."""
        try:
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
                time.sleep(0.01)
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
            deadline = time.monotonic() + _KILLED_S
            for rank, process in enumerate(self._processes):
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    logger.error("rank %d (pid %d) was killed, but the system has not ended it", rank, process.pid)
                if process.stdin is not None:
                    process.stdin.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _last_words(self, rank: int) -> str:
        try:
            text = self._log(rank).read_text(errors="replace")
        except OSError:  # somebody has tidied up
            return ""
        lines = [line for line in split_lines(text) if line.strip() and " INFO " not in line]
        return f"; its last words: {lines[-1].strip()}" if lines else ""

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"


def _environment(options: EngineConfig) -> dict[str, str]:
    """Of the workers."""
    environment = dict(os.environ)
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if not options.peer_access:
        environment["NCCL_P2P_DISABLE"] = "1"  # what is forbidden to us is forbidden to NCCL
    # Multicast over NVLink needs rights that a shared host does not give, and none of our transports uses it.
    environment.setdefault("NCCL_NVLS_ENABLE", "0")
    environment.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    # Workers find modules where this process does, also in a notebook or a script's own folder.
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return environment
