"""The kernels of a captured step: how often each runs, how long, and how long the device does nothing between them."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

_LONGEST_NAME = 300
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class KernelRun:
    """One run of a kernel, or a copy, on the device. Times in us on the device's clock."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLine:
    """One kernel's part of a step. share: of the time of all kernels."""

    name: str
    calls: float
    us: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTable:
    """The kernels of a step, the largest first. Times in us a step.

    all_us: of all kernels, added up; kernels on several streams may run at the same time. gap_us: the time in which
    nothing runs. A kernel that waits for another rank counts as running.
    """

    lines: list[KernelLine]
    num_kernels: int  # different ones
    calls: float
    all_us: float
    gap_us: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def kernel_table(runs: Sequence[KernelRun], *, num_steps: int, most: int) -> KernelTable:
    """The table of `num_steps` equal steps, with at most `most` lines."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        by_name[run.name].append(run.end_us - run.start_us)
    all_us = sum(map(sum, by_name.values()))
    lines = [
        KernelLine(
            name=name[:_LONGEST_NAME],
            calls=len(times) / num_steps,
            us=sum(times) / num_steps,
            share=sum(times) / all_us if all_us else 0.0,
        )
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))
    ]
    return KernelTable(
        lines=lines[:most],
        num_kernels=len(by_name),
        calls=len(runs) / num_steps,
        all_us=all_us / num_steps,
        gap_us=_gap_us(runs) / num_steps,
    )


def _gap_us(runs: Sequence[KernelRun]) -> float:
    """The time between the first start and the last end in which nothing runs."""
    gap, end = 0.0, None
    for run in sorted(runs, key=lambda run: run.start_us):
        if end is not None:
            gap += max(0.0, run.start_us - end)
        end = run.end_us if end is None else max(end, run.end_us)
    return gap


def profile_kernels(run: Callable[[], None]) -> list[KernelRun]:
    """Call `run`, which waits for the device at its end, and return what ran on the device meanwhile."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorded.export_chrome_trace(file.name)
        return kernel_runs(json.loads(Path(file.name).read_text())["traceEvents"])


def kernel_runs(events: Sequence[dict[str, Any]]) -> list[KernelRun]:
    """The kernels and copies among the events of a trace."""
    return [
        KernelRun(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in _ON_DEVICE
    ]
