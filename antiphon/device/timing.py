"""How long work takes on a device: events on a GPU, the clock on the CPU.

    timer = timer_for(device)
    timer.start()                  # nothing else may be queued on the stream
    run()
    reading = timer.stop()         # the host does not wait
    elapsed_ms = timer.elapsed_ms(reading)  # it waits here

A timer belongs to one host thread, and times what that thread queues on the stream that is current.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Reading:
    """A start and an end; what they are is the timer's own business."""

    start: Any
    stop: Any


class StepTimer(Protocol):
    """Measures one stretch of work after the other."""

    def start(self) -> None:
        """The stretch begins with what is queued next."""
        ...

    def stop(self) -> Reading:
        """The stretch ends with what was queued last; never blocks the host."""
        ...

    def elapsed_ms(self, reading: Reading) -> float:
        """Its length; blocks the host until it has ended."""
        ...


class CpuTimer:
    """`StepTimer` of the CPU, where queueing is doing."""

    def __init__(self) -> None:
        self._start_ns = 0

    def start(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def stop(self) -> Reading:
        return Reading(self._start_ns, time.perf_counter_ns())

    def elapsed_ms(self, reading: Reading) -> float:
        elapsed_ns: int = reading.stop - reading.start
        return elapsed_ns * 1e-6


def timer_for(device: torch.device) -> StepTimer:
    """The timer of a device, for the stream that is current."""
    if device.type == "cpu":
        return CpuTimer()
    from antiphon.device.cuda_timing import CudaTimer  # only where there is such a device

    return CudaTimer(device)
