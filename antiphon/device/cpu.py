"""The CPU, whose only stream is the calling thread.

Work is complete when its launch returns, so recording an event and waiting for it cost nothing. The host blocks in the
wait of a pending instead.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from antiphon.device.device import Captured, Device, DeviceMemory, Event, Reading, StepTimer, Streams, T


class HostDevice(Device):
    """A device that computes on the CPUs of the host, in host memory. All ranks share the one device."""

    def _torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def collective_backend(self) -> str:
        return "gloo"

    def count(self) -> int:
        return 1

    def current_index(self) -> int:
        return 0

    def synchronize(self) -> None:
        return

    def memory(self) -> DeviceMemory:
        """The memory of the host, shared by all processes."""
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        free_pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
        return DeviceMemory(free_pages * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes)

    def release_unused(self) -> None:
        return

    def reset_peak(self) -> None:
        """Does nothing: the peak of a process cannot be reset."""

    def peak_bytes(self) -> int:
        """The largest resident size of this process since it started."""
        import resource  # not available on every system

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


class CpuDevice(HostDevice):
    """The CPUs of the host."""

    def describe(self) -> str:
        return f"CPU ({platform.machine()})"

    def activate(self) -> None:
        return

    def streams(self, *, own_compute: bool = False) -> Streams:
        return CpuStreams(self)

    def timer(self) -> StepTimer:
        return CpuTimer()


class _CpuEvent:
    __slots__ = ()

    def synchronize(self) -> None:
        return


_HAPPENED = _CpuEvent()


class CpuStreams:
    """`Streams` of a CPU rank. The calling thread is both the compute and the comm stream."""

    def __init__(self, owner: Device | None = None) -> None:
        self.owner = owner if owner is not None else CpuDevice("cpu")
        self.device = self.owner.torch_device

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self) -> Event:
        return _HAPPENED

    def wait(self, event: Event) -> None:
        assert event is _HAPPENED, "an event of another device reached CpuStreams"

    def comm(self, *, after: Event, name: str = "comm") -> AbstractContextManager[None]:
        self.wait(after)
        return nullcontext()

    def join(self) -> None:
        return

    @property
    def capturing(self) -> bool:
        return False

    def capture(self, run: Callable[[], T]) -> Captured[T]:
        raise AssertionError("a CPU runs work at once, so there is nothing to capture")

    def on_compute_stream(self) -> bool:
        return True

    def leave_free(self, num_sms: int) -> AbstractContextManager[None]:
        return nullcontext()


class CpuTimer:
    """`StepTimer` of the CPU, by the clock: work is complete when its launch returns."""

    def __init__(self) -> None:
        self._start_ns = 0

    def start(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def stop(self) -> Reading:
        return Reading(self._start_ns, time.perf_counter_ns())

    def elapsed_ms(self, reading: Reading) -> float:
        elapsed_ns: int = reading.stop - reading.start
        return elapsed_ns * 1e-6
