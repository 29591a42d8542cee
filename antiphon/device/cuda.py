"""CUDA devices: the generic device, and what only CUDA offers.

CUDA adds peer access, stream memory operations, an SM carve-out, raw stream handles for driver calls, and a faster
lookup of the current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic

import torch

from antiphon.device.device import Captured, Event, Identity, Streams, T
from antiphon.device.generic import HIGH_PRIORITY, GenericDevice, GenericStreams


class CudaDevice(GenericDevice):
    """One CUDA device."""

    peer_access = True
    stream_memory_operations = True
    sm_carveout = True
    capturable = True
    fused_kernels = True

    @property
    def collective_backend(self) -> str:
        return "nccl"

    def count(self) -> int:
        """The number of CUDA devices; 0 without a driver or with a CPU build of torch."""
        return int(torch.cuda.device_count())

    def describe(self) -> str:
        return str(torch.cuda.get_device_name(self.torch_device))

    def streams(self, *, own_compute: bool = False) -> Streams:
        return CudaStreams(self.torch_device, own_compute=own_compute)

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.torch_device, priority=HIGH_PRIORITY)  # type: ignore[no-untyped-call]

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.torch_device)

    def set_stream(self, stream: torch.cuda.Stream) -> None:
        torch.cuda.set_stream(stream)

    def identity(self) -> Identity:
        """The device's index and UUID. The name is "" if torch does not report a UUID."""
        return Identity(self.index, str(getattr(torch.cuda.get_device_properties(self.index), "uuid", "")))

    def reaches(self, others: Iterable[Identity]) -> bool:
        """Whether it can access the memory of these devices; it always reaches its own.

        Also False if this process sees a device under another index than its rank does. If each process has its own
        CUDA_VISIBLE_DEVICES, it cannot query the devices of the others, and torch does not share memory between such
        processes.
        """
        return all(
            other.index < self.count()
            and CudaDevice(self.kind, other.index).identity() == other
            and (other.index == self.index or torch.cuda.can_device_access_peer(self.index, other.index))
            for other in others
        )


class CudaStreams(GenericStreams):
    """`Streams` of one CUDA device. own_compute: see `Device.streams`."""

    def __init__(self, device: torch.device, *, own_compute: bool = False) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        super().__init__(CudaDevice("cuda", index))
        if own_compute:
            compute = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            compute.wait_stream(self._compute)
            self._compute = compute
        self._compute_handle: int = self._compute.cuda_stream
        self._start: torch.cuda.Event | None = None  # on the compute stream, where a run first forked
        self._capturing = False
        self._pool: Any = None  # of the memory of all captures

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), "an event of another device reached CudaStreams"
        super().wait(event)

    @property
    def compute_handle(self) -> int:
        """The raw handle of the compute stream, for driver calls."""
        return self._compute_handle

    def queue_on(self, name: str, *, after: Event | None = None) -> int:
        """The raw handle of a comm stream, for driver calls. Work queued there later runs after `after`.

        Without `after` it runs after the work that was on the compute stream at the first fork since the last join. A
        capture contains only streams that have forked from the compute stream.
        """
        stream = self._comm_stream(name)
        if name not in self._forked:
            self._forked.add(name)
            if self._start is None:
                self._start = self._compute.record_event()
            if after is None:
                stream.wait_event(self._start)
        if after is not None:
            assert isinstance(after, torch.cuda.Event)
            stream.wait_event(after)
        handle: int = stream.cuda_stream
        return handle

    def record_on(self, name: str) -> Event:
        """Record an event on a comm stream."""
        event: torch.cuda.Event = self._comm_stream(name).record_event()
        return event

    def join(self) -> None:
        super().join()
        self._start = None

    @property
    def capturing(self) -> bool:
        return self._capturing

    def capture(self, run: Callable[[], T]) -> Captured[T]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may call the driver meanwhile, such as that of a process group.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local")
        self._start, self._capturing = None, True
        cause: Exception | None = None
        try:
            with capture:
                try:
                    result = run()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            # Ending a capture that has failed fails as well, and torch raises that error.
            raise error if cause is None else cause from None
        finally:
            self._forked.clear()
            self._start, self._capturing = None, False
        return CudaGraph(graph, result)

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

    def _current(self) -> Any:
        """The current stream, without asking torch in the common case."""
        return self._compute if self.on_compute_stream() else torch.cuda.current_stream(self.device)


@dataclass(frozen=True, slots=True)
class CudaGraph(Generic[T]):
    """`Captured` as a CUDA graph. It must be replayed with the compute stream current."""

    graph: torch.cuda.CUDAGraph
    result: T

    def replay(self) -> None:
        self.graph.replay()


def cuda_versions() -> dict[str, str]:
    """Versions of the libraries that torch uses on a CUDA device. Does not initialize CUDA."""
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return {"nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)}
