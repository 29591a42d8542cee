"""Runs one function on several ranks, each in its own process, and collects the results. Needs no engine.

    results = run_on_ranks("package.module:function", ranks=2, device="cpu", options={"repeats": 3})

The function gets a connected `RankGroup`, its device and the options. Options and results are JSON. No process outlives
the call or the calling process. On CUDA, rank r uses the device cuda:r.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from antiphon.core.errors import AntiphonError, ModelError, OptionError
from antiphon.launch import LocalLauncher, Place, RankProcesses, end_with_launcher

_TASK_FILE = "task.json"
_PROGRESS_FILE = "progress"
_MOST_OUTPUT = 4000  # characters of each rank in an error
_OWN_ERRORS: dict[str, type[AntiphonError]] = {"OptionError": OptionError, "ModelError": ModelError}


class RanksError(AntiphonError, RuntimeError):
    """A rank raised, died or did not end in time. The message contains the output of each rank."""


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
    """Call `module:function` with (group, device, options) on every rank. Returns the results in rank order.

    device: "cpu" or "cuda". timeout_s: how long a rank waits for a peer. limit_s: everything is killed after this time.
    environment: variables to add for the ranks. Rank 0 writes to this process's stderr, for example its progress.
    Raises `OptionError` or `ModelError` if a rank did, else `RanksError` with the tracebacks of the ranks.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
    with LocalLauncher().prepare(ranks, prefix="antiphon-ranks-") as processes:
        task = {"function": function_path, "device": device, "options": dict(options), "timeout_s": timeout_s}
        (processes.folder / _TASK_FILE).write_text(json.dumps(task))
        processes.start(
            "antiphon.bench.ranks", {"OMP_NUM_THREADS": threads, **(environment or {})}, show_stderr_of_rank_0=True
        )
        failure = processes.wait(limit_s)
        processes.end()
        if failure is not None:
            raise _error(f"{function_path} on {ranks} ranks: {failure}", processes)
        return [_read_result(processes.folder, rank)["returned"] for rank in range(ranks)]


def _read_result(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"result-{rank}"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def _error(what: str, processes: RankProcesses) -> AntiphonError:
    """A rank's own error if the user can fix it, else a `RanksError` with the output of all ranks."""
    results = [_read_result(processes.folder, rank) for rank in range(processes.size)]
    for result in results:
        if result.get("kind") in _OWN_ERRORS:
            return _OWN_ERRORS[result["kind"]](**result["fields"])
    reports = []
    for rank, result in enumerate(results):
        said = result.get("traceback") or ("(returned)" if "returned" in result else "(no result)")
        printed = processes.output(rank)[-_MOST_OUTPUT:].strip()
        reports.append(f"--- rank {rank}, exit code {processes.exit_code(rank)}\n{said.strip()}\n{printed}".rstrip())
    return RanksError("\n".join([what, *reports]))


# ---- in the process of a rank


def _call(place: Place) -> Any:
    task = json.loads((place.folder / _TASK_FILE).read_text())
    module_name, _, name = task["function"].partition(":")
    function = getattr(import_module(module_name), name)

    # Imported late, so that the parent is watched before torch is loaded.
    from antiphon.comm import ProgressBoard, RankGroup
    from antiphon.device.table import rank_device

    device = rank_device(task["device"], place.rank)
    device.activate()
    group = RankGroup.connect(
        rank=place.rank,
        size=place.size,
        init_method=place.meeting,
        timeout_s=task["timeout_s"],
        board=ProgressBoard(place.folder / _PROGRESS_FILE, size=place.size),
    )
    result = function(group, device.torch_device, task["options"])
    group.close()  # not after an error: until the process ends, its watch may be needed
    return result


def _main() -> int:
    place = Place.from_arguments()
    end_with_launcher(place.folder)
    try:
        _write_result(place, json.dumps({"returned": _call(place)}))
    except BaseException as error:
        # Write before the traceback's frames are released: they hold transports, which may wait for their device.
        _write_result(place, _failure(error))
        os._exit(1)
    return 0


def _failure(error: BaseException) -> str:
    told = "".join(traceback.format_exception(error))
    fields = error.fields() if isinstance(error, AntiphonError) else {}
    return json.dumps({"kind": type(error).__name__, "fields": fields, "traceback": told})


def _write_result(place: Place, content: str) -> None:
    unfinished = place.folder / f"unfinished-{place.rank}"
    unfinished.write_text(content)
    unfinished.rename(place.folder / f"result-{place.rank}")


if __name__ == "__main__":
    exit_code = _main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # skips the second that unloading torch takes
