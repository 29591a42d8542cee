"""Run one function on several ranks, each in a process of its own, and bring home what it returns.

    counts = run_ranks("tests.comm.rank_checks:count_tokens", 2, "argument")  # [of rank 0, of rank 1]

The function gets a connected `RankGroup` and the arguments; with `connect=False` it gets a `Meeting` instead and
connects by itself, as often as it likes. No process outlives the call, nor the process that called.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from antiphon.launch import LocalLauncher, Place, RankProcesses, end_with_launcher

__all__ = ["Meeting", "RanksError", "run_ranks"]

_TASK_FILE = "task.pickle"


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
    with LocalLauncher().prepare(size, prefix="antiphon-ranks-") as ranks:
        (ranks.folder / _TASK_FILE).write_bytes(pickle.dumps((function_path, args, connect, timeout_s)))
        ranks.start("tests.support.ranks")
        failure = ranks.wait(limit_s)
        ranks.end()
        if failure is not None:
            raise RanksError(f"{function_path} on {size} ranks: {failure}\n{_reports(ranks)}")
        return [_read_result(ranks.folder, rank)[1] for rank in range(size)]


def _reports(ranks: RankProcesses) -> str:
    reports = []
    for rank in range(ranks.size):
        kind, value = _read_result(ranks.folder, rank)
        said = value if kind == "error" else f"({kind})"
        printed = ranks.output(rank)[-4000:].strip()
        reports.append(f"--- rank {rank}, exit code {ranks.exit_code(rank)}\n{said}\n{printed}".rstrip())
    return "\n".join(reports)


def _read_result(folder: Path, rank: int) -> tuple[str, Any]:
    path = folder / f"result-{rank}"
    return pickle.loads(path.read_bytes()) if path.exists() else ("no result", None)


# ---- in the process of a rank


def _call(place: Place) -> Any:
    function_path, args, connect, timeout_s = pickle.loads((place.folder / _TASK_FILE).read_bytes())
    meeting = Meeting(rank=place.rank, size=place.size, folder=place.folder)
    module_name, _, name = function_path.partition(":")
    function = getattr(import_module(module_name), name)
    if not connect:
        return function(meeting, *args)
    import torch

    from antiphon.comm import RankGroup

    torch.set_num_threads(1)
    group = RankGroup.connect(rank=place.rank, size=place.size, init_method=place.meeting, timeout_s=timeout_s)
    try:
        return function(group, *args)
    finally:
        group.close()


def _main() -> int:
    place = Place.from_arguments()
    end_with_launcher(place.folder)
    try:
        content = pickle.dumps(("returned", _call(place)))
    except BaseException:
        content = pickle.dumps(("error", traceback.format_exc()))
        code = 1
    else:
        code = 0
    unfinished = place.folder / f"unfinished-{place.rank}"
    unfinished.write_bytes(content)
    unfinished.rename(place.folder / f"result-{place.rank}")
    return code


if __name__ == "__main__":
    sys.exit(_main())
