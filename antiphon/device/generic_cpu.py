"""`generic:cpu`: the generic device on a pretended accelerator, whose work the CPU does at once.

It exercises the generic streams, the queued transports over gloo and the engine above them on any machine, also in
worker processes. It tracks the current stream as hardware does. Work never runs late, so it cannot reveal a missing
wait.
"""

from __future__ import annotations

import time

import torch

from antiphon.device.cpu import HostDevice
from antiphon.device.generic import GenericDevice


class PretendedDevice(HostDevice, GenericDevice):
    """The CPU behind the generic device's calls, without its own memory or pinned memory."""

    own_memory = False
    pinned_memory = False
    default_dtype = torch.float32

    def __init__(self, kind: str, index: int = 0) -> None:
        super().__init__(kind, index)
        self._default = self._current = PretendedStream()

    def describe(self) -> str:
        return "CPU as a pretended accelerator"

    def activate(self) -> None:
        self._current = self._default

    def new_stream(self) -> PretendedStream:
        return PretendedStream()

    def new_event(self) -> PretendedEvent:
        return PretendedEvent()

    def current_stream(self) -> PretendedStream:
        return self._current

    def set_stream(self, stream: PretendedStream) -> None:
        self._current = stream


class PretendedEvent:
    """A point in time on a pretended stream."""

    def __init__(self) -> None:
        self._recorded_ns = 0

    def record(self, stream: PretendedStream) -> None:
        self._recorded_ns = time.perf_counter_ns()

    def synchronize(self) -> None:
        assert self._recorded_ns, "waited for an event that was never recorded"

    def elapsed_time(self, later: PretendedEvent) -> float:
        """Time from this event to a later one, in ms."""
        return (later._recorded_ns - self._recorded_ns) * 1e-6


class PretendedStream:
    """A queue that is always empty: work is complete when its launch returns."""

    def record_event(self) -> PretendedEvent:
        event = PretendedEvent()
        event.record(self)
        return event

    def wait_event(self, event: PretendedEvent) -> None:
        assert isinstance(event, PretendedEvent), "an event of another device reached a pretended stream"
        event.synchronize()

    def wait_stream(self, stream: PretendedStream) -> None:
        return
