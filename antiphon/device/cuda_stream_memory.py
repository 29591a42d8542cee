"""Copies, flags and waits that a CUDA stream executes by itself, without a kernel and without using an SM.

A thin layer over `cuda.bindings.driver`, which torch installs. Addresses are device addresses; streams are raw handles.
Source: CUDA driver API, stream memory operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

from antiphon.core.errors import OptionError


def _find_driver() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except (
        ImportError
    ):  # the module must import all the same: transports that need the driver report that it is missing
        return None


driver = _find_driver()
_OPERATION: Any = None if driver is None else driver.CUstreamBatchMemOpType
_WAIT: Any = None if driver is None else driver.CUstreamWaitValue_flags
_MAPPED_FOR_ALL = 0x1 | 0x2  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP


def check_stream_memory_operations(device: torch.device, what: str) -> bool:
    """Check that the device has stream memory operations, and return whether its waits can flush remote writes.

    Raises `OptionError` if it has none. what: the subject of the error's sentence.
    """
    if driver is None:
        raise OptionError(
            f"{what} needs the Python package cuda-bindings", remedy="`pip install cuda-bindings`", option="transport"
        )
    attribute = driver.CUdevice_attribute
    if not _attribute(device, attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS):
        raise OptionError(
            f"{what} needs stream memory operations",
            limit=f"{device} or its driver does not have them",
            remedy="use alltoall",
            option="transport",
        )
    return bool(_attribute(device, attribute.CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES))


def register_host_memory(memory: torch.Tensor, what: str) -> int:
    """Pin `memory` (uint8 on the CPU, page-aligned) for this process and return its device address.

    Raises `OptionError` if it cannot be pinned.
    """
    (error,) = driver.cuMemHostRegister(memory.data_ptr(), memory.numel(), _MAPPED_FOR_ALL)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise OptionError(
            f"{what} cannot pin {memory.numel() / 2**20:.0f} MiB of host memory",
            limit=error.name,
            remedy="raise the limit on locked memory (ulimit -l, docker --ulimit memlock=-1) or lower max_tokens",
            option="max_tokens",
        )
    return int(_checked(driver.cuMemHostGetDevicePointer(memory.data_ptr(), 0), "cuMemHostGetDevicePointer"))


def unregister_host_memory(memories: Sequence[torch.Tensor]) -> None:
    """Wait for the current device, then undo `register_host_memory`."""
    torch.cuda.synchronize()
    for memory in memories:
        _checked(driver.cuMemHostUnregister(memory.data_ptr()), "cuMemHostUnregister")


class StreamMemory:
    """The operations that a medium queues on its streams. A recorder may take its place."""

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Queue a copy between two addresses that the device can reach. A copy engine runs it if one is not local."""
        _checked(driver.cuMemcpyAsync(target, source, num_bytes, stream), "cuMemcpyAsync")

    def run(self, operations: StreamOperations, stream: int) -> None:
        """Queue writes and waits."""
        operations.queue(stream)

    def capture(self, stream: int, queue: Callable[[], None]) -> Replay:
        """Capture what `queue` queues on `stream`, so that one call can queue it again."""
        return Replay(stream, queue)


class Replay:
    """A CUDA graph of what a function queues on a stream, so that one call can queue it again."""

    def __init__(self, stream: int, queue: Callable[[], None]) -> None:
        """Call `queue`, which issues driver calls on `stream`. None of them runs before `Replay.queue`."""
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _checked(driver.cuStreamBeginCapture(stream, mode), "cuStreamBeginCapture")
        try:
            queue()
        except BaseException:
            driver.cuStreamEndCapture(stream)  # the first error is the cause
            raise
        graph = _checked(driver.cuStreamEndCapture(stream), "cuStreamEndCapture")
        self._graph = _checked(driver.cuGraphInstantiate(graph, 0), "cuGraphInstantiate")
        _checked(driver.cuGraphDestroy(graph), "cuGraphDestroy")
        # Destroying a graph that still runs is safe, because the driver defers it. At process exit it is not.
        weakref.finalize(self, driver.cuGraphExecDestroy, self._graph).atexit = False

    def queue(self, stream: int) -> None:
        _checked(driver.cuGraphLaunch(self._graph, stream), "cuGraphLaunch")


class MemoryStep(NamedTuple):
    """One stream memory operation: a write of `value`, or a wait for it."""

    waits: bool
    address: int
    value: int


class StreamOperations:
    """Writes and waits in a fixed order, built once and queued as often as needed.

    Values may be changed between two calls of `queue`: the driver has read them when `queue` returns.
    """

    def __init__(self, *, flush: bool) -> None:
        """flush: whether waits also make remote writes visible that arrived before the flag."""
        self._operations: list[Any] = []
        self.steps: list[MemoryStep] = []  # the same, for a recorder
        self._wait_flags = int(_WAIT.CU_STREAM_WAIT_VALUE_EQ) | (int(_WAIT.CU_STREAM_WAIT_VALUE_FLUSH) if flush else 0)

    def write(self, address: int, value: int) -> int:
        """Write a 32-bit word after everything queued before; returns a number for `set_value`."""
        operation = driver.CUstreamBatchMemOpParams()
        operation.operation = _OPERATION.CU_STREAM_MEM_OP_WRITE_VALUE_32
        operation.writeValue.flags = 0  # with a memory barrier
        return self._add(operation, operation.writeValue, MemoryStep(False, address, value))

    def wait(self, address: int, value: int) -> None:
        """Hold the stream until the 32-bit word has this value."""
        operation = driver.CUstreamBatchMemOpParams()
        operation.operation = _OPERATION.CU_STREAM_MEM_OP_WAIT_VALUE_32
        operation.waitValue.flags = self._wait_flags
        self._add(operation, operation.waitValue, MemoryStep(True, address, value))

    def _add(self, operation: Any, parameters: Any, step: MemoryStep) -> int:
        parameters.address = driver.CUdeviceptr(step.address)
        parameters.value = step.value
        self._operations.append(operation)
        self.steps.append(step)
        return len(self._operations) - 1

    def set_value(self, number: int, value: int) -> None:
        self._operations[number].writeValue.value = value

    def queue(self, stream: int) -> None:
        if self._operations:
            _checked(
                driver.cuStreamBatchMemOp(stream, len(self._operations), self._operations, 0), "cuStreamBatchMemOp"
            )


def _attribute(device: torch.device, attribute: Any) -> int:
    ordinal = _checked(driver.cuDeviceGet(device.index), "cuDeviceGet")
    return int(_checked(driver.cuDeviceGetAttribute(attribute, ordinal), "cuDeviceGetAttribute"))


def _checked(result: tuple[Any, ...], call: str) -> Any:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{call} failed: {result[0].name}")
    return result[1] if len(result) > 1 else None
