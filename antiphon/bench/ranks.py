"""Runs one function on several ranks, a process each, and brings home what it returns, without an engine.

    results = run_on_ranks("package.module:function", ranks=2, device="cpu", options={"repeats": 3})

The function gets a connected `RankGroup`, its device and the options; options and results are JSON. No process outlives
the call, nor the process that called. Rank r on CUDA uses the device cuda:r.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from antiphon.core.errors import AntiphonError, ModelError, OptionError

_TASK_FILE = "task.json"
_MEETING_FILE = "meeting"
_PROGRESS_FILE = "progress"
_GRACE_S = 1.0
"""How long the other ranks may go on after the first failure, so that their tracebacks are shown too."""

_LAST_WORDS = 4000
_OWN_ERRORS: dict[str, type[AntiphonError]] = {"OptionError": OptionError, "ModelError": ModelError}


class RanksError(AntiphonError, RuntimeError):
    """A rank raised, died or did not end in time; the message holds what each rank had to say."""


def run_on_ranks(
    function_path: str,
    *,
    ranks: int,
    device: str,
    options: Mapping[str, Any],
    timeout_s: float = 60.0,
    limit_s: float = 3600.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `module:function` with (group, device, options) on every rank; the results in order of rank.

    device: "cpu" or "cuda". timeout_s: longest wait of a rank for a peer. limit_s: everything is killed after it.
    environment: added to that of the ranks. Rank 0 may write to this process's stderr: progress, for instance.
    Raises `OptionError` or `ModelError` if a rank did, else `RanksError` with the tracebacks of the ranks.
    """
    with tempfile.TemporaryDirectory(prefix="antiphon-ranks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        task = {"function": function_path, "ranks": ranks, "device": device, "options": dict(options)}
        (folder / _TASK_FILE).write_text(json.dumps({**task, "timeout_s": timeout_s}))
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                processes.append(_start(rank, folder, ranks, environment or {}))
            failure = _wait_for_all(processes, limit_s)
        finally:
            _kill(processes)
        if failure is not None:
            raise _error(f"{function_path} on {ranks} ranks: {failure}", processes, folder)
        return [_read_result(folder, rank)["returned"] for rank in range(ranks)]


def _start(rank: int, folder: Path, ranks: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    own = dict(os.environ)
    own.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    own.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    own["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    with (folder / f"output-{rank}").open("wb") as output:
        return subprocess.Popen(
            # -P: modules of the current folder must not hide those of the library.
            [sys.executable, "-P", "-m", "antiphon.bench.ranks", str(rank), str(folder)],
            env=own | dict(environment),
            stdin=subprocess.PIPE,  # its end tells the rank that this process is gone
            stdout=output,
            stderr=None if rank == 0 else output,
            start_new_session=True,  # Ctrl-C reaches this process only
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
            failure = f"rank {failed[0]} failed first, {_end(codes[failed[0]])}"
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.02)
    else:
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
        return failure or f"ranks {late} did not end within {limit_s:g} s and were killed"
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    return failure or (f"rank {failed[0]} failed, {_end(processes[failed[0]].returncode)}" if failed else None)


def _end(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the session, so that what a rank started goes too
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _read_result(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"result-{rank}"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def _error(what: str, processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> AntiphonError:
    """The rank's own error if it is the user's to mend, else all that the ranks said."""
    results = [_read_result(folder, rank) for rank in range(len(processes))]
    for result in results:
        if result.get("kind") in _OWN_ERRORS:
            return _OWN_ERRORS[result["kind"]](result["message"])
    reports = []
    for rank, result in enumerate(results):
        said = result.get("traceback") or ("(returned)" if "returned" in result else "(no result)")
        printed = (folder / f"output-{rank}").read_text(errors="replace")[-_LAST_WORDS:].strip()
        reports.append(f"--- rank {rank}, exit code {processes[rank].returncode}\n{said.strip()}\n{printed}".rstrip())
    return RanksError("\n".join([what, *reports]))


# ---- in the process of a rank


def _end_with_parent(folder: Path) -> None:
    def watch() -> None:
        while os.read(0, 1):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _call(rank: int, folder: Path) -> Any:
    task = json.loads((folder / _TASK_FILE).read_text())
    module_name, _, name = task["function"].partition(":")
    function = getattr(import_module(module_name), name)

    from antiphon.comm import (  # here, so that the watch of the parent is up before torch is loaded
        ProgressBoard,
        RankGroup,
    )
    from antiphon.device.table import rank_device

    device = rank_device(task["device"], rank)
    device.activate()
    group = RankGroup.connect(
        rank=rank,
        size=task["ranks"],
        init_method=f"file://{folder / _MEETING_FILE}",
        timeout_s=task["timeout_s"],
        board=ProgressBoard(folder / _PROGRESS_FILE, size=task["ranks"]),
    )
    result = function(group, device.torch_device, task["options"])
    group.close()  # not after an error: the process ends, and its watch may be needed until then
    return result


def _main() -> int:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    _end_with_parent(folder)
    try:
        _write_result(rank, folder, json.dumps({"returned": _call(rank, folder)}))
    except BaseException as error:
        # Written before the frames of the traceback go, and with them transports that may wait for their device.
        _write_result(rank, folder, _failure(error))
        os._exit(1)
    return 0


def _failure(error: BaseException) -> str:
    told = "".join(traceback.format_exception(error))
    return json.dumps({"kind": type(error).__name__, "message": str(error), "traceback": told})


def _write_result(rank: int, folder: Path, content: str) -> None:
    unfinished = folder / f"unfinished-{rank}"
    unfinished.write_text(content)
    unfinished.rename(folder / f"result-{rank}")


if __name__ == "__main__":
    exit_code = _main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # torch takes a second to unload
