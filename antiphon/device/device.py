"""The contract of a device: its capabilities, streams, timers and memory figures. `table` lists the kinds.

    device = find_device("cuda", rank)  # touches no hardware
    device.activate()
    streams = device.streams()
    device.reset_peak()
    ...                                 # run something
    used = device.peak_bytes()          # of the whole device, other processes included

The compute stream is the caller's, or the engine's own (`Device.streams`). A rank also has one comm stream, and
further named ones if its transport needs them (an upload and a download stream). A transport uses them in the same way
on every device:

    ready = streams.record()              # on the compute stream, once the data is ready (early event)
    with streams.comm(after=ready):       # work launched inside runs on the comm stream, after the event
        work = group.all_to_all(...)
        arrived = streams.record()
    ...
    streams.wait(arrived)                 # in finish: the compute stream waits, the host does not
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class DeviceMemory(NamedTuple):
    """Bytes of a device that no process uses, and its total."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Identity:
    """A device's index in this process, and its host-wide name ("" if it has none)."""

    index: int
    name: str


class Device(ABC):
    """One device of one kind. Constructing it touches no hardware.

    The class attributes are its capabilities. The rest of Antiphon checks these, never the kind.
    """

    queues: ClassVar[bool] = False
    """Work is queued on streams, and the host runs ahead of the device."""

    own_memory: ClassVar[bool] = False
    """The device has its own memory, in which the size of the KV cache is measured."""

    pinned_memory: ClassVar[bool] = False
    """Copies from pinned host memory do not block the host."""

    peer_access: ClassVar[bool] = False
    """Devices may be able to access each other's memory, and `reaches` reports whether they can."""

    stream_memory_operations: ClassVar[bool] = False
    """A stream can write a flag in memory and wait for one."""

    sm_carveout: ClassVar[bool] = False
    """GEMMs can leave SMs free for communication kernels."""

    fused_kernels: ClassVar[bool] = True
    """Fused kernels may run, if the type of `torch_device` has them. If False, plain torch runs."""

    capturable: ClassVar[bool] = False
    """Work queued on a stream can be captured, to be replayed by one launch (a CUDA graph)."""

    default_dtype: ClassVar[torch.dtype] = torch.float32
    """The dtype of a model unless the user chooses one."""

    def __init__(self, kind: str, index: int = 0) -> None:
        """kind: as the user writes it and as the table has it, such as "cuda" or "generic:cuda"."""
        self.kind = kind
        self.index = index
        self.torch_device = self._torch_device()
        self.autocast_types = tuple(
            dict.fromkeys((self.torch_device.type, "cpu"))
        )  # device types whose autocast state lanes must leave unchanged

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind!r}, {self.index})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and (self.kind, self.index) == (other.kind, other.index)

    def __hash__(self) -> int:
        return hash((self.kind, self.index))

    @abstractmethod
    def _torch_device(self) -> torch.device:
        """The `torch.device` of its tensors."""

    @property
    @abstractmethod
    def collective_backend(self) -> str:
        """The backend of torch.distributed that moves its tensors, such as "gloo" or "nccl"."""

    @abstractmethod
    def count(self) -> int:
        """Number of devices of this kind that this process may use. Does not initialize them."""

    def current_index(self) -> int:
        """Index of the current device of this kind in this process."""
        return 0

    @abstractmethod
    def describe(self) -> str:
        """The device in words, such as "NVIDIA H200" or "CPU (x86_64)"."""

    @abstractmethod
    def activate(self) -> None:
        """Make it the current device of this process, and turn TF32 off so that float32 GEMMs keep their precision."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until all work launched on the device is complete."""

    @abstractmethod
    def streams(self, *, own_compute: bool = False) -> Streams:
        """Streams of the device, with the current one as the compute stream. Call it once per rank.

        own_compute: a new compute stream instead, behind all work queued so far, on devices that can be captured: the
        default stream of a CUDA device waits for all others and cannot be. Work with it inside `Streams.current`.
        """

    @abstractmethod
    def timer(self) -> StepTimer:
        """A timer for the current stream."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """Free and total memory, over all processes."""

    @abstractmethod
    def release_unused(self) -> None:
        """Wait for the device and return cached memory that no tensor uses, for other processes and libraries."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Call `release_unused` and restart the peak that `peak_bytes` reports."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Peak memory in use on the device since `reset_peak`: this process's peak plus what others hold now."""

    def identity(self) -> Identity:
        """Identifies the device among those of all processes on the host."""
        return Identity(self.index, "")

    def reaches(self, others: Iterable[Identity]) -> bool:
        """Whether it can access the memory of these devices. `others` are the identities of all ranks' devices."""
        return False


class Event(Protocol):
    """A point on a stream."""

    def synchronize(self) -> None:
        """Block the host until the stream has reached the point."""
        ...


class Streams(Protocol):
    """One rank's compute and comm streams."""

    @property
    def owner(self) -> Device:
        """The device that the streams belong to. Two kinds of device may share one `torch.device`."""
        ...

    @property
    def device(self) -> torch.device:
        """The `torch.device` of the tensors of transports that use these streams."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make the compute stream the current one of this thread inside the context."""
        ...

    def record(self) -> Event:
        """Record an event on the current stream."""
        ...

    def wait(self, event: Event) -> None:
        """Make the current stream wait for `event`. Never blocks the host."""
        ...

    def comm(self, *, after: Event, name: str = "comm") -> AbstractContextManager[None]:
        """Make the named comm stream current inside the context. Work launched there runs after `after`."""
        ...

    def join(self) -> None:
        """Make the compute stream wait for all work launched on comm streams since the last join, as a step's end does.

        A comm stream that was not used in between is left alone: a captured step may only join what it has forked.
        """
        ...

    @property
    def capturing(self) -> bool:
        """Whether work is being captured. It does not run then, and what the host writes is fixed in the graph."""
        ...

    def capture(self, run: Callable[[], T]) -> Captured[T]:
        """Call `run` and capture what it queues on the compute stream and on comm streams, which it must join.

        Only for devices that are `capturable`. Every kernel must have run before with the same shapes. Memory that
        `run` allocates belongs to a pool that all captures of these streams share; a replay overwrites it.
        """
        ...

    def on_compute_stream(self) -> bool:
        """Whether the compute stream is current. Lanes must be on it when they switch."""
        ...

    def leave_free(self, num_sms: int) -> AbstractContextManager[None]:
        """Make GEMMs inside the context leave that many SMs to communication kernels; 0 leaves none."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """Start and end of a measurement, in a form that only its timer understands."""

    start: Any
    stop: Any


class Captured(Protocol[T_co]):
    """Work that was captured. All of its addresses are fixed: a replay reads and writes the same memory."""

    @property
    def result(self) -> T_co:
        """What the captured function returned. Its tensors hold the results of the last replay."""
        ...

    def replay(self) -> None:
        """Queue the work again on the compute stream, with one launch. Never blocks the host."""
        ...


class StepTimer(Protocol):
    """Measures consecutive stretches of work on the current stream. Use it from one host thread."""

    def start(self) -> None:
        """Start the stretch before the work queued next."""
        ...

    def stop(self) -> Reading:
        """End the stretch after the work queued last. Never blocks the host."""
        ...

    def elapsed_ms(self, reading: Reading) -> float:
        """Duration of the stretch in ms. Blocks the host until the stretch has ended."""
        ...
