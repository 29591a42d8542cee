"""The contract of a device: what it can do, its streams, timers and memory figures. `table` says which kinds there are.

    device = find_device("cuda", rank)  # touches no hardware
    device.activate()
    streams = device.streams()
    device.reset_peak()
    ...                                 # run something
    used = device.peak_bytes()          # of all memory of the device, whoever took it

The compute stream is the caller's; a rank has one comm stream beside it, and more by name where a transport needs them
(an upload and a download stream). A transport uses it like this, the same on every device:

    ready = streams.record()              # on the compute stream, when the data is ready (early event)
    with streams.comm(after=ready):       # what is launched inside goes to the comm stream, after the event
        work = group.all_to_all(...)
        arrived = streams.record()
    ...
    streams.wait(arrived)                 # in finish: the compute stream waits, the host does not
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch


class DeviceMemory(NamedTuple):
    """Bytes of a device: not used by anybody, and in all."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Identity:
    """A device's index in this process, and its name in all processes ("" where it has none)."""

    index: int
    name: str


class Device(ABC):
    """One device of one kind; making it touches no hardware.

    The class attributes are its capabilities. The rest of Antiphon asks for these, never for the kind.
    """

    queues: ClassVar[bool] = False
    """Work is queued on streams, and the host runs ahead of it."""

    own_memory: ClassVar[bool] = False
    """Its memory is not the host's: how much is left for a KV cache is measured there."""

    pinned_memory: ClassVar[bool] = False
    """Copies from pinned host memory run beside the host."""

    peer_access: ClassVar[bool] = False
    """Devices may access each other's memory, and can say whether they do."""

    stream_memory_operations: ClassVar[bool] = False
    """A stream can write a flag in memory and wait for one."""

    sm_carveout: ClassVar[bool] = False
    """GEMMs can leave SMs free for communication kernels."""

    fused_kernels: ClassVar[bool] = True
    """Kernels may go by the type of its tensors; False: plain torch runs even where that type has fused kernels."""

    capturable: ClassVar[bool] = False
    """A stream's work can be captured into a graph."""

    default_dtype: ClassVar[torch.dtype] = torch.float32
    """The dtype of a model's numbers where nobody asks for another."""

    def __init__(self, kind: str, index: int = 0) -> None:
        """kind: as the user writes it and as the table has it, such as "cuda" or "generic:cuda"."""
        self.kind = kind
        self.index = index
        self.torch_device = self._torch_device()
        self.autocast_types = tuple(dict.fromkeys((self.torch_device.type, "cpu")))  # whose state the lanes must keep

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
        """Devices of this kind that this process may use; starts nothing on them."""

    def current_index(self) -> int:
        """The index of the device of this kind that is current in this process."""
        return 0

    @abstractmethod
    def describe(self) -> str:
        """The device in words, such as "NVIDIA H200" or "CPU (x86_64)"."""

    @abstractmethod
    def activate(self) -> None:
        """Make it the current device of this process; float32 products on it are exact from then on (no TF32)."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until all that was launched on the device is done."""

    @abstractmethod
    def streams(self) -> Streams:
        """Streams of the device; the one that is current becomes the compute stream. Make them once."""

    @abstractmethod
    def timer(self) -> StepTimer:
        """A timer for the stream that is current."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """What is free and what there is, for all processes together."""

    @abstractmethod
    def release_unused(self) -> None:
        """Give memory that no tensor uses back, for other processes and libraries; waits for the device."""

    @abstractmethod
    def reset_peak(self) -> None:
        """`release_unused`, and let `peak_bytes` count from then on."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """The most memory of the device in use since `reset_peak`: this process's peak, and what others hold."""

    def identity(self) -> Identity:
        """What tells the device from others in all processes of the host."""
        return Identity(self.index, "")

    def reaches(self, others: Iterable[Identity]) -> bool:
        """Whether it can access the memory of these devices. `others` are the identities of all ranks' devices."""
        return False


class Event(Protocol):
    """A point on a stream."""


class Streams(Protocol):
    """One rank's compute and comm streams."""

    @property
    def owner(self) -> Device:
        """The device they belong to. Two kinds of device may share one `torch.device`."""
        ...

    @property
    def device(self) -> torch.device:
        """The `torch.device` of the tensors of transports that use these streams."""
        ...

    @property
    def device_types(self) -> tuple[str, ...]:
        """Devices whose autocast state the lanes must keep, such as ("cpu",)."""
        ...

    def record(self) -> Event:
        """An event on the stream that is current."""
        ...

    def wait(self, event: Event) -> None:
        """Let the stream that is current wait for `event`; never blocks the host where work is queued."""
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
        """Inside, GEMMs leave that many SMs to communication kernels; 0 leaves none."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """A start and an end; what they are is the timer's own business."""

    start: Any
    stop: Any


class StepTimer(Protocol):
    """Measures one stretch of work after the other, on the stream that is current. It belongs to one host thread."""

    def start(self) -> None:
        """The stretch begins with what is queued next."""
        ...

    def stop(self) -> Reading:
        """The stretch ends with what was queued last; never blocks the host."""
        ...

    def elapsed_ms(self, reading: Reading) -> float:
        """Its length; blocks the host until it has ended."""
        ...
