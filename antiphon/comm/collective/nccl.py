"""NCCL collectives on the current stream, on their own communicator and under the device watch.

Used inside `streams.comm(...)`. The host never waits here. Work queued after `wait` may read what a collective brings.
All of it can be captured: collectives are called without `async_op`, so torch's watchdog does not poll their events,
and they stay in the order of the comm stream, so no order of a graph's branches lets two ranks wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from antiphon.comm.collective.queued import QueuedGroup
from antiphon.comm.device_watch import ALL_PEERS
from antiphon.comm.group import RankGroup, Work, located
from antiphon.device.cuda_stream_memory import StreamOperations
from antiphon.runtime import CudaStreams, Event, Streams

_CTA_POLICY_ZERO = 2


class NcclCollective:
    """A queued collective, with the interface of `Collective`."""

    __slots__ = ("_arrived", "_streams", "_tensors")

    def __init__(self, streams: Streams, arrived: Event, tensors: tuple[torch.Tensor, ...]) -> None:
        self._streams = streams
        self._arrived = arrived
        self._tensors = tensors  # kept alive until the wait

    def wait(self) -> None:
        """Make the current stream wait for it."""
        self._streams.wait(self._arrived)

    def ready_ns(self) -> int | None:
        return None


class NcclGroup(QueuedGroup):
    """A communicator among all ranks of `group`. All ranks must make it at the same time.

    max_ctas: blocks that a collective may occupy; by default NCCL chooses. zero_cta: use copy engines where NCCL can,
    for buffers from `symmetric_buffers`.
    """

    def __init__(
        self, group: RankGroup, streams: CudaStreams, *, max_ctas: int | None = None, zero_cta: bool = False
    ) -> None:
        self._max_ctas = max_ctas
        self._zero_cta = zero_cta
        super().__init__(group, streams)
        self._pools: list[torch.cuda.MemPool] = []
        self._word = group.device_watch().word("comm")
        self._begin = StreamOperations(flush=False)
        self._code = self._begin.write(self._word.address, 0)
        self._end = StreamOperations(flush=False)
        self._end.write(self._word.address, 0)

    def _open(self) -> dist.ProcessGroup:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if self._max_ctas is not None:
            options.config.min_ctas = options.config.max_ctas = self._max_ctas
        if self._zero_cta:
            options.config.cta_policy = _CTA_POLICY_ZERO  # type: ignore[attr-defined]
        timeout_s = 2 * self._group.timeout_s  # so that the device watch reports first
        options._timeout = timedelta(seconds=timeout_s)
        return self._new_group(timeout_s=timeout_s, options=options)

    def symmetric_buffers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Allocate buffers of these sizes (bytes) in windows that all ranks register. All must call it at once."""
        device = self._streams.device
        # Registering a window needs a communicator that has been used.
        dist.all_reduce(torch.zeros(1, device=device), group=self._process_group)
        backend: Any = self._process_group._get_backend(device)
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.inference_mode(False), torch.cuda.use_mem_pool(pool):
            buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        backend.register_mem_pool(pool, symm=True)
        self._pools.append(pool)
        torch.cuda.synchronize(device)
        return buffers

    def close(self) -> None:
        """Deregister the windows. The communicator itself ends with the group's process groups."""
        backend: Any = self._process_group._get_backend(self._streams.device)
        for pool in self._pools:
            backend.deregister_mem_pool(pool)
        self._pools.clear()

    def before_replay(self) -> None:
        self._group.device_watch().next_epoch(self._current())

    def _queue(self, label: str, operation: str, call: Any, *arguments: Any) -> Work:
        self._group.note(label, operation)
        code = self._word.code(located(label), captured=self._streams.capturing)
        self._begin.set_value(self._code, code + ALL_PEERS)  # read when it is queued or captured
        self._begin.queue(self._current())
        call(*arguments, group=self._process_group)
        self._end.queue(self._current())
        return NcclCollective(self._streams, self._streams.record(), arguments[:2])

    def _current(self) -> int:
        """The raw handle of the current stream."""
        handle: int = torch.cuda.current_stream(self._streams.device).cuda_stream
        return handle
