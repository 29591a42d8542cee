"""Any accelerator that PyTorch supports, through `torch.accelerator`, `torch.Stream` and `torch.Event` alone.

    generic         whichever accelerator this torch build has
    generic:cuda    CUDA hardware through these calls only, to test them on a machine with GPUs
    xpu, npu        Intel GPUs; Ascend NPUs, with the plug-in that registers them

It offers streams, memory figures and pinned memory. It uses nothing vendor-specific: no peer access, no stream memory
operations, no fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from antiphon.core.errors import LaneError, OptionError
from antiphon.device.device import Captured, Device, DeviceMemory, Event, Reading, StepTimer, Streams, T

HIGH_PRIORITY = -1
_PREFIX = "generic:"  # of kinds that name the hardware


class GenericDevice(Device):
    """One accelerator of the type that the kind names."""

    queues = True
    own_memory = True
    pinned_memory = True
    fused_kernels = False
    default_dtype = torch.bfloat16

    def __init__(self, kind: str, index: int = 0) -> None:
        if kind == "generic":
            found = torch.accelerator.current_accelerator()
            if found is None:
                raise OptionError(
                    "device='generic' needs an accelerator",
                    limit="this torch build finds none on this machine",
                    remedy="use device='cpu', or 'generic:cpu' to exercise the code without one",
                    option="device",
                    value=kind,
                )
            self._type = found.type
        else:
            self._type = kind.removeprefix(_PREFIX)
        super().__init__(kind, index)

    def _torch_device(self) -> torch.device:
        try:
            return torch.device(self._type, self.index)
        except RuntimeError as error:
            raise OptionError(
                f"device={self.kind!r} is not a device type that this torch build knows",
                remedy="install the plug-in that registers it, such as torch-npu for npu",
                option="device",
                value=self.kind,
            ) from error

    @property
    def collective_backend(self) -> str:
        return str(dist.get_default_backend_for_device(self.torch_device))

    def count(self) -> int:
        found = torch.accelerator.current_accelerator()
        here = found is not None and found.type == self._type
        return torch.accelerator.device_count() if here else 0

    def current_index(self) -> int:
        return int(torch.accelerator.current_device_index())

    def describe(self) -> str:
        module = torch.get_device_module(self.torch_device)
        name = getattr(module, "get_device_name", lambda device: str(device))(self.torch_device)
        return f"{name} ({self.kind})"

    def activate(self) -> None:
        """See `Device.activate`. TF32 would drop the last 13 mantissa bits of every float32 factor, in routers too."""
        torch.accelerator.set_device_index(self.index)
        torch.set_float32_matmul_precision("highest")

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.torch_device)

    def streams(self, *, own_compute: bool = False) -> Streams:
        return GenericStreams(self)

    def timer(self) -> StepTimer:
        return GenericTimer(self)

    def memory(self) -> DeviceMemory:
        """Memory as the driver counts it, including other processes and libraries."""
        module = torch.get_device_module(self.torch_device)
        ask = getattr(torch.accelerator, "get_memory_info", None) or module.mem_get_info  # its name in older versions
        return DeviceMemory(*ask(self.torch_device))

    def release_unused(self) -> None:
        self.synchronize()
        torch.accelerator.empty_cache()

    def reset_peak(self) -> None:
        self.release_unused()
        torch.accelerator.reset_peak_memory_stats(self.torch_device)

    def peak_bytes(self) -> int:
        """See `Device.peak_bytes`. Counts reserved memory, because the allocator will need its fragments again."""
        self.synchronize()
        free_bytes, total_bytes = self.memory()
        outside = total_bytes - free_bytes - torch.accelerator.memory_reserved(self.torch_device)
        return int(outside + torch.accelerator.max_memory_reserved(self.torch_device))

    # ---- primitives of `GenericStreams` and `GenericTimer`

    def new_stream(self) -> Any:
        """A new high-priority stream."""
        return torch.Stream(self.torch_device, priority=HIGH_PRIORITY)

    def new_event(self) -> Any:
        """A new event that records its time."""
        return torch.Event(self.torch_device, enable_timing=True)

    def current_stream(self) -> Any:
        return torch.accelerator.current_stream(self.torch_device)

    def set_stream(self, stream: Any) -> None:
        """Make `stream` the current one."""
        torch.accelerator.set_stream(stream)


class GenericStreams:
    """`Streams` of one accelerator. Not thread-safe: one host thread issues all work.

    A comm stream is created when its name is first used. Nothing here blocks the host.
    """

    def __init__(self, owner: GenericDevice) -> None:
        self.owner: Device = owner
        self.device = owner.torch_device
        self._calls = owner
        self._compute = owner.current_stream()
        self._comm: dict[str, Any] = {}
        self._forked: set[str] = set()  # comm streams with work that the compute stream has not joined

    @contextmanager
    def current(self) -> Iterator[None]:
        if self.on_compute_stream():
            yield
            return
        before = self._calls.current_stream()
        self._calls.set_stream(self._compute)
        try:
            yield
        finally:
            self._calls.set_stream(before)

    def record(self) -> Event:
        event: Event = self._current().record_event()
        return event

    def wait(self, event: Event) -> None:
        self._current().wait_event(event)

    @contextmanager
    def comm(self, *, after: Event, name: str = "comm") -> Iterator[None]:
        if not self.on_compute_stream():
            raise LaneError(
                "a communication was sent from a stream other than the compute stream",
                remedy="leave the stream context first",
            )
        self._calls.set_stream(self._comm_stream(name))
        self._forked.add(name)
        try:
            self.wait(after)
            yield
        finally:
            self._calls.set_stream(self._compute)

    def join(self) -> None:
        for name in sorted(self._forked):
            self._compute.wait_stream(self._comm[name])
        self._forked.clear()

    @property
    def capturing(self) -> bool:
        return False

    def capture(self, run: Callable[[], T]) -> Captured[T]:
        raise AssertionError(f"work on {self.owner!r} cannot be captured")

    def on_compute_stream(self) -> bool:
        return bool(self._calls.current_stream() == self._compute)

    def leave_free(self, num_sms: int) -> AbstractContextManager[None]:
        """Does nothing: `Device.sm_carveout` is False."""
        return nullcontext()

    def _current(self) -> Any:
        """The current stream. Called at every switch and exchange."""
        return self._calls.current_stream()

    def _comm_stream(self, name: str) -> Any:
        stream = self._comm.get(name)
        if stream is None:
            stream = self._comm[name] = self._calls.new_stream()
        return stream


class GenericTimer:
    """`StepTimer` of one accelerator, by events. Host time counts only if the device waits for the host."""

    def __init__(self, owner: GenericDevice) -> None:
        self._owner = owner
        self._start: Any = None

    def start(self) -> None:
        self._start = self._record()

    def stop(self) -> Reading:
        assert self._start is not None, "stop without start"
        return Reading(self._start, self._record())

    def elapsed_ms(self, reading: Reading) -> float:
        reading.stop.synchronize()
        return float(reading.start.elapsed_time(reading.stop))

    def _record(self) -> Any:
        event = self._owner.new_event()
        event.record(self._owner.current_stream())
        return event
