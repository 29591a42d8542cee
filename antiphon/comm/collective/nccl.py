"""NCCL beside the CPU group: collectives on the stream that is current, watched, on a communicator of their own.

Used inside `streams.comm(...)`. The host never waits here; what a collective brings may be read behind `wait`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from antiphon.comm.device_watch import ALL_PEERS
from antiphon.comm.group import RankGroup, located
from antiphon.device.cuda_stream_memory import StreamOperations
from antiphon.runtime import CudaStreams, Event

_CTA_POLICY_ZERO = 2


class NcclCollective:
    """A collective that has been queued; the same calls as `Collective`."""

    __slots__ = ("_arrived", "_streams", "_tensors")

    def __init__(self, streams: CudaStreams, arrived: Event, tensors: tuple[torch.Tensor, ...]) -> None:
        self._streams = streams
        self._arrived = arrived
        self._tensors = tensors  # kept until it is waited for

    def wait(self) -> None:
        """Let the stream that is current wait for it."""
        self._streams.wait(self._arrived)

    def ready_ns(self) -> int | None:
        return None


class NcclGroup:
    """A communicator of all ranks of `group`. All ranks make it at once.

    max_ctas: blocks that a collective may occupy; NCCL's choice when left out. zero_cta: collectives by copy engines,
    where NCCL can, of buffers that `symmetric_buffers` made.
    """

    @classmethod
    def of(
        cls, group: RankGroup, streams: CudaStreams, *, max_ctas: int | None = None, zero_cta: bool = False
    ) -> NcclGroup:
        """The group's communicator with these settings: transports share it, because it takes a second to make."""
        found = group.extras.get(("nccl", max_ctas, zero_cta))
        if found is None:
            found = cls(group, streams, max_ctas=max_ctas, zero_cta=zero_cta)
            group.extras["nccl", max_ctas, zero_cta] = found
        assert isinstance(found, NcclGroup)
        return found

    def __init__(
        self, group: RankGroup, streams: CudaStreams, *, max_ctas: int | None = None, zero_cta: bool = False
    ) -> None:
        # A program that uses NVLink multicast can disturb others on a shared host, and nothing here needs it.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if max_ctas is not None:
            options.config.min_ctas = options.config.max_ctas = max_ctas
        if zero_cta:
            options.config.cta_policy = _CTA_POLICY_ZERO  # type: ignore[attr-defined]
        options._timeout = timeout = timedelta(seconds=2 * group.timeout_s)  # the device watch speaks first
        self._group = group
        self._streams = streams
        self._pools: list[torch.cuda.MemPool] = []
        # Of the same ranks, should they not be all of the program's.
        whole = group.process_group is None or group.process_group == dist.group.WORLD
        self._process_group = dist.new_group(
            None if whole else dist.get_process_group_ranks(group.process_group),
            use_local_synchronization=not whole,
            backend="nccl",
            pg_options=options,
            timeout=timeout,
            device_id=streams.device,
        )
        self._word = group.device_watch().word("comm")
        self._begin = StreamOperations(flush=False)
        self._code = self._begin.write(self._word.address, 0)
        self._end = StreamOperations(flush=False)
        self._end.write(self._word.address, 0)

    def all_gather(self, out: torch.Tensor, mine: torch.Tensor, label: str) -> NcclCollective:
        """`out` [W * n, ...] gets `mine` [n, ...] of every rank, in order of rank."""
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._announce(label, "all-gather")
        call(out, mine, group=self._process_group)
        return self._sent(out, mine)

    def reduce_scatter(self, out: torch.Tensor, parts: torch.Tensor, label: str) -> NcclCollective:
        """`out` [n, ...] gets the sum over ranks of their part for this rank, in NCCL's order and the parts' dtype."""
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._announce(label, "reduce-scatter")
        call(out, parts, group=self._process_group)
        return self._sent(out, parts)

    def all_to_all(
        self,
        out: torch.Tensor,
        mine: torch.Tensor,
        label: str,
        *,
        out_splits: Sequence[int],
        in_splits: Sequence[int],
    ) -> NcclCollective:
        """Rows of `mine` go to the ranks by `in_splits`; `out` gets theirs by `out_splits`."""
        self._announce(label, "all-to-all")
        dist.all_to_all_single(out, mine, list(out_splits), list(in_splits), group=self._process_group)
        return self._sent(out, mine)

    def symmetric_buffers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Buffers of so many bytes in windows that all ranks have registered; all ranks call it at once."""
        device = self._streams.device
        # Windows need a communicator that has been used.
        dist.all_reduce(torch.zeros(1, device=device), group=self._process_group)
        backend = self._process_group._get_backend(device)
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.inference_mode(False), torch.cuda.use_mem_pool(pool):
            buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        backend.register_mem_pool(pool, symm=True)
        self._pools.append(pool)
        torch.cuda.synchronize(device)
        return buffers

    def close(self) -> None:
        """Give up the windows; the communicator itself ends with the group's process groups."""
        backend = self._process_group._get_backend(self._streams.device)
        for pool in self._pools:
            backend.deregister_mem_pool(pool)
        self._pools.clear()

    def _announce(self, label: str, operation: str) -> None:
        self._group.note(label, operation)
        self._begin.set_value(self._code, self._word.code(located(label)) + ALL_PEERS)
        self._begin.queue(torch.cuda.current_stream(self._streams.device).cuda_stream)

    def _sent(self, *tensors: torch.Tensor) -> NcclCollective:
        self._end.queue(torch.cuda.current_stream(self._streams.device).cuda_stream)
        return NcclCollective(self._streams, self._streams.record(), tensors)
