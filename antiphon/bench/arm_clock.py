"""Times one arm of a comparison on all ranks at once: meet, start, run, stop.

    device   ...idle | start event | the arm's work            | stop event
    host     meet    | queue it    | (host time ends here) ... | wait

The ranks meet on the CPU, so the device is idle when the arm starts, and a late rank shows up in the times of the
others. The clock knows nothing about what an arm does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from antiphon.comm import RankGroup
from antiphon.device.table import device_of

T = TypeVar("T")

_LOADED_S = time.perf_counter()


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """What an arm returned, and its time on this rank."""

    result: T
    elapsed_ms: float  # on the device
    host_ms: float  # until the host has queued it; the same on the CPU


class ArmClock:
    """The clock of one rank. Every rank must time the same arms in the same order."""

    def __init__(self, group: RankGroup, device: torch.device) -> None:
        self._group = group
        self._device = device_of(device)
        self._timer = self._device.timer()

    def measure(self, run: Callable[[], T]) -> Timed[T]:
        """Run an arm once, after all ranks have met."""
        self._device.synchronize()
        meet(self._group)
        self._timer.start()
        start_ns = time.perf_counter_ns()
        result = run()
        host_ms = (time.perf_counter_ns() - start_ns) * 1e-6
        elapsed_ms = self._timer.elapsed_ms(self._timer.stop())
        return Timed(result, elapsed_ms, host_ms)


def meet(group: RankGroup) -> None:
    """Wait on the host until all ranks have arrived."""
    if group.size > 1:
        token = torch.zeros(1, dtype=torch.int64)
        group.all_gather(torch.empty(group.size, dtype=torch.int64), token, "the start of an arm").wait()


def tell(group: RankGroup, text: str) -> None:
    """Print a line of progress on stderr, on rank 0 only, with the seconds since this module was loaded."""
    if group.rank == 0:
        print(f"{time.perf_counter() - _LOADED_S:7.1f} s: {text}", file=sys.stderr, flush=True)
