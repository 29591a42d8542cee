"""Streams of a CUDA device: the caller's compute stream, and comm streams of high priority beside it.

The compute stream is the one that is current when the object is made. Comm streams are made when they are first named.
Nothing here ever blocks the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from antiphon.core.errors import LaneError
from antiphon.device.streams import Event

_HIGH_PRIORITY = -1


class CudaStreams:
    """`Streams` of one CUDA device. Not thread-safe: one host thread issues everything."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.device_types = ("cuda", "cpu")
        self._compute = torch.cuda.current_stream(self.device)
        self._compute_handle: int = self._compute.cuda_stream
        self._comm: dict[str, torch.cuda.Stream] = {}

    def record(self) -> Event:
        event: torch.cuda.Event = self._current().record_event()
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), "an event of another device reached CudaStreams"
        self._current().wait_event(event)

    @property
    def compute_handle(self) -> int:
        """The raw handle of the compute stream, for driver calls."""
        return self._compute_handle

    def queue_on(self, name: str, *, after: Event | None = None) -> int:
        """The raw handle of a comm stream, for driver calls; what is queued there runs after `after`."""
        stream = self._comm_stream(name)
        if after is not None:
            assert isinstance(after, torch.cuda.Event)
            stream.wait_event(after)
        handle: int = stream.cuda_stream
        return handle

    def record_on(self, name: str) -> Event:
        """An event on a comm stream."""
        event: torch.cuda.Event = self._comm_stream(name).record_event()
        return event

    @contextmanager
    def comm(self, *, after: Event, name: str = "comm") -> Iterator[None]:
        stream = self._comm_stream(name)
        if not self.on_compute_stream():
            raise LaneError("a communication was sent away from the compute stream; leave the other stream first")
        torch.cuda.set_stream(stream)
        try:
            self.wait(after)
            yield
        finally:
            torch.cuda.set_stream(self._compute)

    def join(self) -> None:
        for stream in self._comm.values():
            self._compute.wait_stream(stream)

    def on_compute_stream(self) -> bool:
        handle: int = torch._C._cuda_getCurrentRawStream(self.device.index)
        return handle == self._compute_handle

    @contextmanager
    def leave_free(self, num_sms: int) -> Iterator[None]:
        if num_sms == 0:
            yield
            return
        torch._C._set_sm_carveout_experimental(num_sms)
        try:
            yield
        finally:
            torch._C._set_sm_carveout_experimental(None)

    def _current(self) -> torch.cuda.Stream:
        """The stream that is current; asked for at every switch and exchange, so by the quick way."""
        return self._compute if self.on_compute_stream() else torch.cuda.current_stream(self.device)

    def _comm_stream(self, name: str) -> torch.cuda.Stream:
        stream = self._comm.get(name)
        if stream is None:
            stream = torch.cuda.Stream(self.device, priority=_HIGH_PRIORITY)  # type: ignore[no-untyped-call]
            self._comm[name] = stream
        return stream
