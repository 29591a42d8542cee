"""The CPU: a stream is the calling thread, and time is the clock's.

What was launched before an event has happened when the event is recorded, so recording and waiting cost nothing; the
host blocks in the pending's own wait.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from antiphon.device.device import Device, DeviceMemory, Event, Reading, StepTimer, Streams


class HostDevice(Device):
    """Whatever runs on the CPUs of the host and has the host's memory: one device, shared by all ranks."""

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
        """The memory of the host, for all its processes."""
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        free_pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
        return DeviceMemory(free_pages * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes)

    def release_unused(self) -> None:
        return

    def reset_peak(self) -> None:
        """The CPU's peak cannot start afresh."""

    def peak_bytes(self) -> int:
        """The largest resident size that this process ever had."""
        import resource  # not on every system

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


class CpuDevice(HostDevice):
    """The CPUs of the host."""

    def describe(self) -> str:
        return f"CPU ({platform.machine()})"

    def activate(self) -> None:
        return

    def streams(self) -> Streams:
        return CpuStreams(self)

    def timer(self) -> StepTimer:
        return CpuTimer()


class _CpuEvent:
    __slots__ = ()


_HAPPENED = _CpuEvent()


class CpuStreams:
    """Streams of a CPU rank: the calling thread is both of them."""

    def __init__(self, owner: Device | None = None) -> None:
        self.owner = owner if owner is not None else CpuDevice("cpu")
        self.device = self.owner.torch_device
        self.device_types = self.owner.autocast_types

    def record(self) -> Event:
        return _HAPPENED

    def wait(self, event: Event) -> None:
        assert event is _HAPPENED, "an event of another device reached CpuStreams"

    def comm(self, *, after: Event, name: str = "comm") -> AbstractContextManager[None]:
        self.wait(after)
        return nullcontext()

    def join(self) -> None:
        return

    def on_compute_stream(self) -> bool:
        return True

    def leave_free(self, num_sms: int) -> AbstractContextManager[None]:
        return nullcontext()


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
