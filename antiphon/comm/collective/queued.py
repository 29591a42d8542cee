"""Collectives that a device queues, beside the CPU group: the backend is the one that torch has for the device.

Used inside `streams.comm(...)`. Where work is queued the host never waits here; what a collective brings may be read
behind `wait`. `nccl.NcclGroup` is the same for CUDA devices, with a watch over waits that never end.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist

from antiphon.comm.group import Collective, Collectives, RankGroup, Work
from antiphon.runtime import Streams


class QueuedGroup(Collectives):
    """A communicator of all ranks of `group` for the devices of `streams`. All ranks make it at once.

    A peer that never comes is noticed by the backend, after the group's time limit.
    """

    def __init__(self, group: RankGroup, streams: Streams) -> None:
        self._group = group
        self._streams = streams
        self._backend = streams.owner.collective_backend
        self._process_group = self._open()

    @classmethod
    def of(cls, group: RankGroup, streams: Streams, *, max_ctas: int | None = None) -> QueuedGroup:
        """The group's communicator for these devices: transports share it, because it takes a second to make.

        max_ctas: SMs that a collective may occupy, on CUDA devices; NCCL's choice when left out.
        """
        if streams.owner.stream_memory_operations:
            from antiphon.comm.collective.nccl import NcclGroup  # only where there are such devices

            return NcclGroup.shared(group, streams, max_ctas=max_ctas)
        assert max_ctas is None, "only NCCL's kernels can be limited"
        return cls.shared(group, streams)

    @classmethod
    def shared(cls, group: RankGroup, streams: Any, **settings: Any) -> Self:
        """The communicator with these settings, created on first use."""
        key = (cls, *settings.items())
        found = group.extras.get(key)
        if found is None:
            found = group.extras[key] = cls(group, streams, **settings)
        assert isinstance(found, cls)
        return found

    def _open(self) -> dist.ProcessGroup:
        return self._new_group(timeout_s=self._group.timeout_s)

    def _new_group(self, *, timeout_s: float, options: Any = None) -> dist.ProcessGroup:
        # A program that uses NVLink multicast can disturb others on a shared host, and nothing here needs it.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        # Of the same ranks, should they not be all of the program's.
        process_group = self._group.process_group
        whole = process_group is None or process_group == dist.group.WORLD
        made: dist.ProcessGroup = dist.new_group(
            None if whole else dist.get_process_group_ranks(process_group),
            use_local_synchronization=not whole,
            backend=self._backend,
            pg_options=options,
            timeout=timedelta(seconds=timeout_s),
            device_id=self._streams.device if self._streams.owner.own_memory else None,
        )
        return made

    def reduce_scatter(self, out: torch.Tensor, parts: torch.Tensor, label: str) -> Work:
        """`out` [n, ...] gets the sum over ranks of their part for this rank, in the backend's order, parts' dtype."""
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return self._queue(label, "reduce-scatter", call, out, parts)

    def _queue(self, label: str, operation: str, call: Any, *arguments: Any) -> Work:
        launch = partial(call, *arguments, group=self._process_group, async_op=True)
        work = self._group.start(launch, label, operation)
        limited = not self._streams.owner.own_memory
        return Collective(self._group, work, label, arguments[:2], queued=True, limited=limited)

    def close(self) -> None:
        """The communicator ends with the group's process groups."""
