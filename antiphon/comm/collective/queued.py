"""Collectives for devices that queue their work, over torch's backend for the device.

Used inside `streams.comm(...)`. The host never waits here. Work queued after `wait` may read what a collective brings.
`nccl.NcclGroup` does the same for CUDA devices, under the device watch.
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
    """A communicator among all ranks of `group` for the devices of `streams`. All ranks must make it at the same time.

    If a peer never arrives, the backend notices after the group's time limit.
    """

    def __init__(self, group: RankGroup, streams: Streams) -> None:
        self._group = group
        self._streams = streams
        self._backend = streams.owner.collective_backend
        self._process_group = self._open()

    @classmethod
    def of(cls, group: RankGroup, streams: Streams, *, max_ctas: int | None = None) -> QueuedGroup:
        """The group's communicator for these devices. Transports share it, because making one takes a second.

        max_ctas: blocks, each on one SM, that a collective may occupy on CUDA devices; by default NCCL chooses.
        """
        if streams.owner.stream_memory_operations:
            from antiphon.comm.collective.nccl import NcclGroup

            return NcclGroup.shared(group, streams, max_ctas=max_ctas)
        assert max_ctas is None, "only NCCL's kernels can be limited"
        return cls.shared(group, streams)

    @classmethod
    def shared(cls, group: RankGroup, streams: Any, **settings: Any) -> Self:
        """The communicator with these settings; created on first use."""
        key = (cls, *settings.items())
        found = group.extras.get(key)
        if found is None:
            found = group.extras[key] = cls(group, streams, **settings)
        assert isinstance(found, cls)
        return found

    def _open(self) -> dist.ProcessGroup:
        return self._new_group(timeout_s=self._group.timeout_s)

    def _new_group(self, *, timeout_s: float, options: Any = None) -> dist.ProcessGroup:
        # NVLink multicast can disturb other programs on a shared host, and nothing here needs it.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        # The group may be only some of the program's ranks.
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
        """Sum every rank's part for this rank into `out` [n, ...], in the backend's order and the dtype of `parts`."""
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return self._queue(label, "reduce-scatter", call, out, parts)

    def before_replay(self) -> None:
        """See `Transport.before_replay`. By default the backend limits its waits."""

    def _queue(self, label: str, operation: str, call: Any, *arguments: Any) -> Work:
        launch = partial(call, *arguments, group=self._process_group, async_op=True)
        work = self._group.start(launch, label, operation)
        limited = not self._streams.owner.own_memory
        return Collective(self._group, work, label, arguments[:2], queued=True, limited=limited)

    def close(self) -> None:
        """Do nothing: the communicator ends with the group's process groups."""
