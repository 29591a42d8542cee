"""`nccl-zero-cta`: all-gather and all-to-all by NCCL's own copy-engine collectives, as a baseline for `copy-engine`.

NCCL moves a collective by copy engines, without a kernel, if the communicator's CTA policy is ZERO, the buffers lie in
a registered symmetric window, and the stream is not the legacy default one (NCCL 2.28 and newer; docs/facts.md). There
is no such reduce-scatter, so partial sums travel as they are, and their owner adds them in order of rank.

    dispatch   tokens packed into my own part of the gathered rows ── all-gather in place
    combine    two ranks: what the other one gets, copied into my part ── all-gather in place; more: all-to-all
"""

from __future__ import annotations

import torch

from antiphon.comm import needs
from antiphon.comm.collective.nccl import NcclCollective, NcclGroup
from antiphon.comm.counts import exchange_counts
from antiphon.comm.group import RankGroup
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import RowFormat
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Flight, Transport, TransportPart
from antiphon.core.errors import OptionError
from antiphon.core.warn_once import warn_once
from antiphon.kernels.pack import add_in_rank_order
from antiphon.machine.facts import Facts
from antiphon.runtime import CudaStreams, Streams

_COPY_ENGINES_SINCE = (2, 28)


class NcclZeroCtaTransport(Transport):
    """Every rank gets all tokens; needs NVLink between all ranks."""

    name = "nccl-zero-cta"

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        return (
            needs.gpus(world)
            or needs.library(facts, world, "nccl")
            or needs.refusal_of(needs.lacks_of_peer_access(facts, world))
        )

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
    ) -> None:
        super().__init__(shape, group=group, streams=streams, num_lanes=num_lanes, max_tokens=max_tokens)
        if not isinstance(streams, CudaStreams):
            raise OptionError(f"NCCL needs CUDA devices, not {streams.device}")
        warn_of_kernels(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        self._format = RowFormat(shape)
        self._nccl = NcclGroup.of(group, streams, zero_cta=True)
        rows = group.size * max_tokens
        row_bytes, sum_bytes = self._format.row_bytes, shape.hidden_size * shape.dtype.itemsize
        sizes = [size for _ in range(num_lanes) for size in (rows * row_bytes, rows * sum_bytes, rows * sum_bytes)]
        buffers = self._nccl.symmetric_buffers(sizes)
        self._gathered, self._home, self._partials = buffers[0::3], buffers[1::3], buffers[2::3]
        self._tokens = [(0, 0)] * num_lanes  # mine, and padded to the most of any rank

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        if tokens_by_rank is None:
            tokens_by_rank = exchange_counts(self.group, x_TD.shape[0], lane=lane, label=label)
        num_tokens, padded = x_TD.shape[0], max(tokens_by_rank)
        self._tokens[lane] = (num_tokens, padded)
        row = self._format
        gathered = self._gathered[lane][: self.group.size * padded * row.row_bytes].view(-1, row.row_bytes)
        mine = gathered[self.group.rank * padded : (self.group.rank + 1) * padded]
        if self.part is not TransportPart.LINK_ONLY:
            row.pack(mine[:num_tokens], x_TD, routes)
            if num_tokens < padded:
                row.ids(mine)[num_tokens:] = -1
        partials_RD = self._sums(self._partials[lane], padded)
        work: NcclCollective | None = None
        if self.part is not TransportPart.COMPUTE_ONLY and padded:
            with self.streams.comm(after=self.streams.record()):
                work = self._nccl.all_gather(gathered, mine, label)

        def wait() -> Rows:
            if work is not None:
                work.wait()
            return self.rows(row.x(gathered), row.ids(gathered), row.weights(gathered), partials_RD)

        return Flight(wait=wait, num_bytes=(self.group.size - 1) * padded * row.row_bytes)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        num_tokens, padded = self._tokens[lane]
        size, rank = self.group.size, self.group.rank
        partials_RD = self._sums(self._partials[lane], padded)
        self.keep_sums(partials_RD, partial_RD)
        sums_WTD = partials_RD.view(size, padded, self.shape.hidden_size)
        home = self._sums(self._home[lane], padded)
        home_WTD = home.view(size, padded, self.shape.hidden_size)
        two_ranks = size == 2
        if two_ranks and self.part is not TransportPart.LINK_ONLY:
            home_WTD[rank].copy_(sums_WTD[1 - rank])
        work: NcclCollective | None = None
        if self.part is not TransportPart.COMPUTE_ONLY and padded:
            with self.streams.comm(after=self.streams.record()):
                if two_ranks:
                    work = self._nccl.all_gather(home, home_WTD[rank], label)
                else:
                    equal = [padded] * size
                    work = self._nccl.all_to_all(home, partials_RD, label, out_splits=equal, in_splits=equal)

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            parts = [(sums_WTD if r == rank else home_WTD)[r][:num_tokens] for r in range(size)]
            return parts[rank] if self.part is TransportPart.LINK_ONLY else add_in_rank_order(parts)

        return Flight(wait=wait, num_bytes=(size - 1) * padded * self.shape.hidden_size * self.shape.dtype.itemsize)

    def _sums(self, buffer: torch.Tensor, padded: int) -> torch.Tensor:
        """[W * padded, D] at the start of a buffer."""
        num_bytes = self.group.size * padded * self.shape.hidden_size * self.shape.dtype.itemsize
        return buffer[:num_bytes].view(self.shape.dtype).view(-1, self.shape.hidden_size)


def warn_of_kernels(nccl: tuple[int, ...]) -> None:
    """Say so if this NCCL has no collectives by copy engines, and silently launches its kernels instead."""
    if nccl < _COPY_ENGINES_SINCE:
        warn_once(
            f"NCCL {'.'.join(map(str, nccl))} has no collectives by copy engines, so nccl-zero-cta launches kernels",
            cost="it takes SMs from compute, and is not a baseline for copy-engine",
            remedy=f"use a torch with NCCL {'.'.join(map(str, _COPY_ENGINES_SINCE))} or later",
        )
