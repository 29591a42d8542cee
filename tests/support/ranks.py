"""Run one function on several ranks, each in a process of its own, and bring home what it returns.

    counts = run_ranks("tests.comm.rank_checks:count_tokens", 2, "argument")  # [of rank 0, of rank 1]

The function gets a connected `RankGroup` and the arguments; with `connect=False` it gets a `Meeting` instead and
connects by itself, as often as it likes. No process outlives the call, nor the process that called.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["Meeting", "RanksError", "run_ranks"]

_REPOSITORY = Path(__file__).resolve().parents[2]
_TASK_FILE = "task.pickle"
_GRACE_S = 1.0
"""How long the other ranks may go on after the first failure, so that their tracebacks are shown too."""


class RanksError(AssertionError):
    """A rank raised, died or did not end in time; the message holds what each rank had to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the ranks of one call can meet. `folder` belongs to the call and is empty but for hidden details."""

    rank: int
    size: int
    folder: Path

    def init_method(self, name: str) -> str:
        """A meeting place; every connection needs a name of its own, the same on all ranks."""
        return f"file://{self.folder / f'meeting-{name}'}"


def run_ranks(
    function_path: str,
    size: int,
    *args: Any,
    connect: bool = True,
    timeout_s: float = 60.0,
    limit_s: float = 100.0,
) -> list[Any]:
    """Call `module:function` with (group, *args) on every rank; the results in order of rank.

    timeout_s: the group's time limit. limit_s: seconds after which everything is killed. Arguments and results are
    pickled. Raises `RanksError` with the tracebacks of the ranks.
    """
    with tempfile.TemporaryDirectory(prefix="antiphon-ranks-") as name:
        folder = Path(name)
        (folder / _TASK_FILE).write_bytes(pickle.dumps((function_path, size, args, connect, timeout_s)))
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                processes.append(_start(rank, folder))
            end = _wait_for_all(processes, limit_s)
        finally:
            _kill(processes)
        if end is not None:
            raise RanksError(f"{function_path} on {size} ranks: {end}\n{_reports(processes, folder)}")
        return [_read_result(folder, rank)[1] for rank in range(size)]


def _start(rank: int, folder: Path) -> subprocess.Popen[bytes]:
    search_path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
    with (folder / f"output-{rank}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranks", str(rank), str(folder)],
            cwd=_REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,  # its end tells the rank that this process is gone
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for_all(processes: Sequence[subprocess.Popen[bytes]], limit_s: float) -> str | None:
    """`None` once every rank has ended well, else what went wrong."""
    deadline = time.monotonic() + limit_s
    failure: str | None = None
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            break
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and failure is None:
            failure = f"rank {failed[0]} failed first, with exit code {codes[failed[0]]}"
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.02)
    else:
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
        return failure or f"ranks {late} did not end within {limit_s:g} s"
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    return failure or (f"ranks {failed} failed" if failed else None)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the session, so that what a rank started goes too
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _reports(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> str:
    reports = []
    for rank, process in enumerate(processes):
        kind, value = _read_result(folder, rank)
        said = value if kind == "error" else f"({kind})"
        printed = (folder / f"output-{rank}").read_text(errors="replace")[-4000:].strip()
        reports.append(f"--- rank {rank}, exit code {process.returncode}\n{said}\n{printed}".rstrip())
    return "\n".join(reports)


def _read_result(folder: Path, rank: int) -> tuple[str, Any]:
    path = folder / f"result-{rank}"
    return pickle.loads(path.read_bytes()) if path.exists() else ("no result", None)


# ---- in the process of a rank


def _end_with_parent() -> None:
    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _call(rank: int, folder: Path) -> Any:
    function_path, size, args, connect, timeout_s = pickle.loads((folder / _TASK_FILE).read_bytes())
    meeting = Meeting(rank=rank, size=size, folder=folder)
    module_name, _, name = function_path.partition(":")
    function = getattr(import_module(module_name), name)
    if not connect:
        return function(meeting, *args)
    import torch

    from antiphon.comm import RankGroup

    torch.set_num_threads(1)
    group = RankGroup.connect(rank=rank, size=size, init_method=meeting.init_method("0"), timeout_s=timeout_s)
    try:
        return function(group, *args)
    finally:
        group.close()


def _main() -> int:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    _end_with_parent()
    try:
        content = pickle.dumps(("returned", _call(rank, folder)))
    except BaseException:
        content = pickle.dumps(("error", traceback.format_exc()))
        code = 1
    else:
        code = 0
    unfinished = folder / f"unfinished-{rank}"
    unfinished.write_bytes(content)
    unfinished.rename(folder / f"result-{rank}")
    return code


if __name__ == "__main__":
    sys.exit(_main())
