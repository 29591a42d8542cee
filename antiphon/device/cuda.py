"""CUDA devices: the caller's compute stream, comm streams of high priority beside it, events and the driver's figures.

The compute stream is the one that is current when the streams are made. Comm streams are made when they are first
named. Nothing in `CudaStreams` ever blocks the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from antiphon.core.errors import LaneError
from antiphon.device.device import Device, DeviceMemory, Event, Identity, Reading, StepTimer, Streams

_HIGH_PRIORITY = -1


class CudaDevice(Device):
    """One CUDA device."""

    queues = True
    own_memory = True
    pinned_memory = True
    peer_access = True
    stream_memory_operations = True
    sm_carveout = True
    capturable = True
    default_dtype = torch.bfloat16

    def _torch_device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def collective_backend(self) -> str:
        return "nccl"

    def count(self) -> int:
        """0 without a driver or with a CPU build of torch."""
        return int(torch.cuda.device_count())

    def current_index(self) -> int:
        return int(torch.cuda.current_device())

    def describe(self) -> str:
        return str(torch.cuda.get_device_name(self.torch_device))

    def activate(self) -> None:
        """TF32 would cost float32 its last 13 bits of every factor, routers included."""
        torch.cuda.set_device(self.torch_device)
        torch.set_float32_matmul_precision("highest")

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def streams(self) -> Streams:
        return CudaStreams(self.torch_device)

    def timer(self) -> StepTimer:
        return CudaTimer(self.torch_device)

    def memory(self) -> DeviceMemory:
        """As the driver counts it: other processes and other libraries included."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
        return DeviceMemory(int(free_bytes), int(total_bytes))

    def release_unused(self) -> None:
        self.synchronize()
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        self.release_unused()
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_bytes(self) -> int:
        """Reserved, not allocated memory is counted: what the allocator could not reuse would be missing again."""
        self.synchronize()
        free_bytes, total_bytes = self.memory()
        outside = total_bytes - free_bytes - torch.cuda.memory_reserved(self.torch_device)
        return int(outside + torch.cuda.max_memory_reserved(self.torch_device))

    def identity(self) -> Identity:
        """Its name is "" if torch does not say."""
        return Identity(self.index, str(getattr(torch.cuda.get_device_properties(self.index), "uuid", "")))

    def reaches(self, others: Iterable[Identity]) -> bool:
        """It reaches its own memory.

        False, too, where this process does not see a device as its rank does: with CUDA_VISIBLE_DEVICES for each
        process nothing can be found out about the others' devices, and torch does not share memory between such
        processes.
        """
        return all(
            other.index < self.count()
            and CudaDevice(self.kind, other.index).identity() == other
            and (other.index == self.index or torch.cuda.can_device_access_peer(self.index, other.index))
            for other in others
        )


class CudaStreams:
    """`Streams` of one CUDA device. Not thread-safe: one host thread issues everything."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.owner: Device = CudaDevice("cuda", index)
        self.device = self.owner.torch_device
        self.device_types = self.owner.autocast_types
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


class CudaTimer:
    """`StepTimer` of one CUDA device; events, so that the host's own time counts only where the device waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: torch.cuda.Event | None = None

    def start(self) -> None:
        self._start = self._record()

    def stop(self) -> Reading:
        assert self._start is not None, "stop without start"
        return Reading(self._start, self._record())

    def elapsed_ms(self, reading: Reading) -> float:
        reading.stop.synchronize()
        return float(reading.start.elapsed_time(reading.stop))

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def cuda_versions() -> dict[str, str]:
    """The versions of the libraries that torch uses on a CUDA device. Asking initializes nothing there."""
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return {"nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)}
