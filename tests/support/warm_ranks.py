"""Ranks that have loaded torch before they start: each is forked from a server process that waits with it in memory.

Loading torch takes a rank of a test longer than most of what it does then. `warm` makes `LocalLauncher` start ranks 0
and 1 of this process so. Each of the two has a server of its own, because processes that are forked from one would hash
alike, and ranks do not. Everything else stays as with the launcher: a session of its own, standard input that closes
with this process, environment, folder, log and exit code.
"""

from __future__ import annotations

import os
import pickle
import runpy
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from antiphon.launch import LocalLauncher
from antiphon.launch.local import LocalRanks

__all__ = ["warm", "warm_pids"]

_REAP_S = 0.01
_WORKER = "antiphon.engine.worker"


class _Server:
    """The process from which all ranks with one number are forked."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._codes: dict[int, int] = {}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.support.warm_ranks", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def fork(self, request: tuple[Any, ...], descriptors: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [pickle.dumps(request)], descriptors)
            while True:
                pid, code = self._receive()
                if code is None:
                    self._codes.pop(pid, None)
                    return pid
                self._codes[pid] = code

    def code(self, pid: int) -> int | None:
        with self._lock:
            while select.select([self._socket], [], [], 0)[0]:
                ended, code = self._receive()
                assert code is not None
                self._codes[ended] = code
            return self._codes.get(pid)

    def _receive(self) -> tuple[int, int | None]:
        message = self._socket.recv(1 << 16)
        assert message, "the server of warm ranks has ended"
        answer: tuple[int, int | None] = pickle.loads(message)
        return answer


class _WarmProcess:
    """What `LocalRanks` uses of a `Popen`."""

    def __init__(self, server: _Server, pid: int, stdin: IO[bytes]) -> None:
        self.pid = pid
        self.stdin = stdin
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._server.code(self.pid)
        return self._code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a warm rank", timeout)
            time.sleep(_REAP_S)
        return code


_servers: dict[int, _Server] = {}
_workers: dict[int, tuple[_WarmProcess, int]] = {}


class WarmRanks(LocalRanks):
    """Ranks 0 and 1 are forked, the others start as ever."""

    def _start(self, rank: int, module: str, environment: dict[str, str], log: IO[bytes], *, show_stderr: bool) -> Any:
        if rank > 1:
            return super()._start(rank, module, environment, log, show_stderr=show_stderr)
        if rank not in _servers:
            _servers[rank] = _Server(environment)
        theirs, ours = os.pipe()
        try:
            request = (module, self.place(rank).arguments(), environment, str(Path.cwd()))
            pid = _servers[rank].fork(request, [theirs, log.fileno(), 2 if show_stderr else log.fileno()])
        finally:
            os.close(theirs)
        process = _WarmProcess(_servers[rank], pid, os.fdopen(ours, "wb"))
        if module == _WORKER:
            _workers[pid] = process, rank
        return process


@contextmanager
def warm() -> Iterator[None]:
    """Inside, `LocalLauncher` prepares `WarmRanks`."""
    cold = LocalLauncher.prepare
    LocalLauncher.prepare = lambda self, size, *, prefix="antiphon-": WarmRanks(size, prefix)  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalLauncher.prepare = cold  # type: ignore[method-assign]


def warm_pids() -> dict[int, int]:
    """Rank by pid of the running workers that were forked for this process."""
    for pid, (process, _) in list(_workers.items()):
        if process.poll() is not None:
            del _workers[pid]
    return {pid: rank for pid, (_, rank) in _workers.items()}


# ---- in the process of a server


def _serve(control: socket.socket) -> None:
    import antiphon.engine.worker

    del antiphon, sys.modules[_WORKER]  # a rank runs it as its main module
    running = 0
    while True:
        if select.select([control], [], [], _REAP_S if running else None)[0]:
            message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not message:
                return
            control.send(pickle.dumps((_fork(control, pickle.loads(message), descriptors), None)))
            running += 1
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running -= 1
            control.send(pickle.dumps((pid, os.waitstatus_to_exitcode(status))))


def _fork(control: socket.socket, request: tuple[Any, ...], descriptors: list[int]) -> int:
    """Returns when the rank has its session, by which it is killed."""
    ready, say_ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        control.close()
        os.close(ready)
        os.close(say_ready)
        _be_rank(*request, descriptors)
    os.close(say_ready)
    os.read(ready, 1)  # its end
    os.close(ready)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def _be_rank(
    module: str, arguments: list[str], environment: dict[str, str], folder: str, descriptors: list[int]
) -> None:
    code: Any = 1
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = dict.fromkeys(environment["PYTHONPATH"].split(os.pathsep))
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
