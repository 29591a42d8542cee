"""Streams and events behind one small interface, with its CPU implementation.

The compute stream is the caller's; a rank has one comm stream beside it, and more by name where a transport needs them
(an upload and a download stream). A transport uses it like this, the same on every device:

    ready = streams.record()              # on the compute stream, when the data is ready (early event)
    with streams.comm(after=ready):       # what is launched inside goes to the comm stream, after the event
        work = group.all_to_all(...)
        arrived = streams.record()
    ...
    streams.wait(arrived)                 # in finish: the compute stream waits, the host does not

On the CPU a stream is the calling thread: what was launched before an event has happened when the event is recorded,
so recording and waiting cost nothing; the host blocks in the pending's own wait.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Event(Protocol):
    """A point on a stream."""


class Streams(Protocol):
    """One rank's compute and comm streams."""

    @property
    def device(self) -> torch.device:
        """Where the streams run, and the tensors of the transports that use them."""
        ...

    @property
    def device_types(self) -> tuple[str, ...]:
        """Devices whose autocast state the lanes must keep, such as ("cpu",)."""
        ...

    def record(self) -> Event:
        """An event on the stream that is current."""
        ...

    def wait(self, event: Event) -> None:
        """Let the stream that is current wait for `event`; never blocks the host on a GPU."""
        ...

    def comm(self, *, after: Event, name: str = "comm") -> AbstractContextManager[None]:
        """Inside, the comm stream of that name is current, and what is launched there runs after `after`."""
        ...

    def join(self) -> None:
        """Let the compute stream wait for all that was launched on the comm streams: the end of a step."""
        ...

    def on_compute_stream(self) -> bool:
        """Whether the compute stream is current; lanes must stay on it when they switch."""
        ...

    def leave_free(self, num_sms: int) -> AbstractContextManager[None]:
        """Inside, matrix products leave so many multiprocessors to communication kernels; 0 leaves none."""
        ...


class _CpuEvent:
    __slots__ = ()


_HAPPENED = _CpuEvent()


class CpuStreams:
    """Streams of a CPU rank: the calling thread is both of them."""

    device = torch.device("cpu")
    device_types: tuple[str, ...] = ("cpu",)

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


def streams_for(device: torch.device) -> Streams:
    """The streams of a device; on a GPU the stream that is current now becomes the compute stream."""
    if device.type == "cpu":
        return CpuStreams()
    from antiphon.device.cuda_streams import CudaStreams  # only where there is such a device

    return CudaStreams(device)
