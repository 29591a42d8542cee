"""`allgather`: every rank gets all tokens, and the partial sums come home by reduce-scatter.

Portable and without counts: only the largest number of tokens of a rank is needed, which the agreement knows. Every
rank pads to it; padding rows carry the expert id -1.

On the CPU the reduce-scatter is an all-to-all of equal parts, whose receiver adds in float32 at least, in order of
rank: as many bytes, a sum that does not depend on timing, and on gloo faster than its own reduce-scatter (docs/log.md).
On GPUs it is NCCL's, which adds in the model's dtype.
"""

from __future__ import annotations

import torch

from antiphon.comm import needs
from antiphon.comm.counts import exchange_counts
from antiphon.comm.group import Collective, RankGroup
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import LaneBuffers, RowFormat
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Flight, Transport, TransportPart
from antiphon.core.errors import OptionError
from antiphon.machine.facts import Facts
from antiphon.runtime import CudaStreams, Streams


class AllGatherTransport(Transport):
    """All-gather of tokens, reduce-scatter of partial sums."""

    name = "allgather"

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        return needs.library(facts, world, "gloo")

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        return Way("over gloo, between the CPUs of this host")

    def __init__(
        self,
        shape: ExpertShape,
        *,
        group: RankGroup,
        streams: Streams,
        num_lanes: int,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        super().__init__(shape, group=group, streams=streams, num_lanes=num_lanes, max_tokens=max_tokens)
        self._format = RowFormat(shape)
        self._buffers = [LaneBuffers(streams.device) for _ in range(num_lanes)]
        self._num_tokens = [0] * num_lanes
        self._padded_tokens = [0] * num_lanes

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        if tokens_by_rank is None:
            tokens_by_rank = exchange_counts(self.group, x_TD.shape[0], lane=lane, label=label)
        num_tokens, padded = x_TD.shape[0], max(tokens_by_rank)
        self._num_tokens[lane], self._padded_tokens[lane] = num_tokens, padded
        buffers, row = self._buffers[lane], self._format
        packed = buffers.get("packed", padded, row.row_bytes, torch.uint8)
        if self.part is not TransportPart.LINK_ONLY:
            row.pack(packed[:num_tokens], x_TD, routes)
            row.ids(packed)[num_tokens:] = -1
        gathered = buffers.get("gathered", padded * self.group.size, row.row_bytes, torch.uint8)
        partials_RD = self._partials(lane)
        work = self._gather(gathered, packed, label) if self.part is not TransportPart.COMPUTE_ONLY else None

        def wait() -> Rows:
            if work is not None:
                work.wait()
            return self.rows(row.x(gathered), row.ids(gathered), row.weights(gathered), partials_RD)

        num_bytes = (self.group.size - 1) * padded * row.row_bytes
        return Flight(wait=wait, ready_ns=None if work is None else work.ready_ns, num_bytes=num_bytes)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        hidden_size, dtype = self.shape.hidden_size, self.shape.dtype
        num_tokens, padded = self._num_tokens[lane], self._padded_tokens[lane]
        partials_RD = self._partials(lane)
        self.keep_sums(partials_RD, partial_RD)
        home = self._buffers[lane].get("home", padded * self.group.size, hidden_size, dtype)
        equal = [padded] * self.group.size
        work: Collective | None = None
        if self.part is not TransportPart.COMPUTE_ONLY:
            with self.streams.comm(after=self.streams.record()):
                work = self.group.all_to_all(home, partials_RD, label, out_splits=equal, in_splits=equal)

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            if self.part is TransportPart.LINK_ONLY:
                return home[:num_tokens]
            out_TD = torch.zeros(num_tokens, hidden_size, dtype=self.shape.weight_dtype, device=home.device)
            for part in torch.split(home, padded) if padded else ():
                out_TD += part[:num_tokens]
            return out_TD.to(dtype)

        num_bytes = self._combine_bytes(padded)
        return Flight(wait=wait, ready_ns=None if work is None else work.ready_ns, num_bytes=num_bytes)

    def _partials(self, lane: int) -> torch.Tensor:
        num_rows = self._padded_tokens[lane] * self.group.size
        return self._buffers[lane].get("partials", num_rows, self.shape.hidden_size, self.shape.dtype)

    def _combine_bytes(self, padded: int) -> int:
        return (self.group.size - 1) * padded * self.shape.hidden_size * self.shape.dtype.itemsize

    def _gather(self, gathered: torch.Tensor, packed: torch.Tensor, label: str) -> Collective:
        with self.streams.comm(after=self.streams.record()):
            return self.group.all_gather(gathered, packed, label)


class NcclAllGatherTransport(AllGatherTransport):
    """The same on CUDA devices, by NCCL. max_ctas: see `NcclGroup`."""

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        return needs.library(facts, world, "nccl") or needs.shm_of_nccl(facts, world)

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        return needs.way_of_nccl(facts, world)

    def __init__(
        self,
        shape: ExpertShape,
        *,
        group: RankGroup,
        streams: Streams,
        num_lanes: int,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        max_ctas: int | None = None,
    ) -> None:
        super().__init__(shape, group=group, streams=streams, num_lanes=num_lanes, max_tokens=max_tokens)
        from antiphon.comm.collective.nccl import NcclGroup  # only where there are such devices

        if not isinstance(streams, CudaStreams):
            raise OptionError(f"NCCL needs CUDA devices, not {streams.device}")
        self._nccl = NcclGroup.of(group, streams, max_ctas=max_ctas)
        self.num_sms = max_ctas or 0
        for lane in range(num_lanes):  # at once, so that the memory that is left can be measured
            self._padded_tokens[lane] = max_tokens
            self._partials(lane)
            for name, num_rows in (("packed", max_tokens), ("gathered", max_tokens * group.size)):
                self._buffers[lane].get(name, num_rows, self._format.row_bytes, torch.uint8)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        num_tokens, padded = self._num_tokens[lane], self._padded_tokens[lane]
        partials_RD = self._partials(lane)
        self.keep_sums(partials_RD, partial_RD)
        # New, the caller's; made on the compute stream, so nothing queued there still uses its memory when the comm
        # stream begins to write.
        out_TD = torch.empty(padded, self.shape.hidden_size, dtype=self.shape.dtype, device=self.streams.device)
        work = None
        if self.part is not TransportPart.COMPUTE_ONLY:
            with self.streams.comm(after=self.streams.record()):
                work = self._nccl.reduce_scatter(out_TD, partials_RD, label)

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            return out_TD[:num_tokens]

        return Flight(wait=wait, num_bytes=self._combine_bytes(padded))

    def _gather(self, gathered: torch.Tensor, packed: torch.Tensor, label: str) -> Collective:
        with self.streams.comm(after=self.streams.record()):
            return self._nccl.all_gather(gathered, packed, label)  # type: ignore[return-value]
