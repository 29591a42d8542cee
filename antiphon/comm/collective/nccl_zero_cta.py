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
from antiphon.comm.collective.allgather import AllGatherTransport, PaddedExchange
from antiphon.comm.collective.nccl import NcclGroup
from antiphon.comm.group import RankGroup
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.stepwise import Work, flight_of
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Flight
from antiphon.core.errors import OptionError
from antiphon.core.warn_once import warn_once
from antiphon.kernels.pack import add_in_rank_order
from antiphon.machine.facts import Facts
from antiphon.runtime import CudaStreams, Streams

_COPY_ENGINES_SINCE = (2, 28)


class NcclZeroCtaTransport(AllGatherTransport):
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
            raise OptionError(
                f"transport {self.name!r} needs CUDA devices, not {streams.device}",
                remedy="use allgather",
                option="transport",
                value=self.name,
            )
        warn_of_kernels(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        self._nccl = NcclGroup.shared(group, streams, zero_cta=True)
        rows = group.size * max_tokens
        row_bytes, sum_bytes = self._format.row_bytes, shape.hidden_size * shape.dtype.itemsize
        sizes = [size for _ in range(num_lanes) for size in (rows * row_bytes, rows * sum_bytes, rows * sum_bytes)]
        buffers = self._nccl.symmetric_buffers(sizes)
        self._rows = buffers[0::3]
        self._windows = {"home": buffers[1::3], "partials": buffers[2::3]}

    def send(self, exchange: PaddedExchange, label: str) -> Flight[None]:
        work: Work | None = None
        if exchange.padded:
            with self.streams.comm(after=self.streams.record()):
                work = self._nccl.all_gather(self._gathered(exchange), self._packed(exchange), label)
        return flight_of(work, num_bytes=(self.group.size - 1) * exchange.padded * self._format.row_bytes)

    def keep(self, exchange: PaddedExchange, partial_RD: torch.Tensor) -> None:
        super().keep(exchange, partial_RD)
        if self.group.size == 2:
            self._home(exchange)[self.group.rank].copy_(self._by_rank("partials", exchange)[1 - self.group.rank])

    def send_back(self, exchange: PaddedExchange, label: str) -> Flight[None]:
        size, home = self.group.size, self._sums("home", exchange)
        work: Work | None = None
        if exchange.padded:
            with self.streams.comm(after=self.streams.record()):
                if size == 2:
                    work = self._nccl.all_gather(home, self._home(exchange)[self.group.rank], label)
                else:
                    equal = [exchange.padded] * size
                    partials_RD = self.partials_of(exchange)
                    work = self._nccl.all_to_all(home, partials_RD, label, out_splits=equal, in_splits=equal)
        return flight_of(work, num_bytes=self._combine_bytes(exchange))

    def add(self, exchange: PaddedExchange) -> torch.Tensor:
        rank, home_WTD, sums_WTD = self.group.rank, self._home(exchange), self._by_rank("partials", exchange)
        sums = [(sums_WTD if source == rank else home_WTD)[source] for source in range(self.group.size)]
        return add_in_rank_order([sum_TD[: exchange.num_tokens] for sum_TD in sums])

    def _packed(self, exchange: PaddedExchange) -> torch.Tensor:
        """My own part of the gathered rows."""
        padded, rank = exchange.padded, self.group.rank
        return self._gathered(exchange)[rank * padded : (rank + 1) * padded]

    def _gathered(self, exchange: PaddedExchange) -> torch.Tensor:
        num_bytes = self.group.size * exchange.padded * self._format.row_bytes
        return self._rows[exchange.lane][:num_bytes].view(-1, self._format.row_bytes)

    def _sums(self, name: str, exchange: PaddedExchange) -> torch.Tensor:
        num_bytes = self.group.size * exchange.padded * self.shape.hidden_size * self.shape.dtype.itemsize
        return self._windows[name][exchange.lane][:num_bytes].view(self.shape.dtype).view(-1, self.shape.hidden_size)

    def _home(self, exchange: PaddedExchange) -> torch.Tensor:
        return self._by_rank("home", exchange)

    def _by_rank(self, name: str, exchange: PaddedExchange) -> torch.Tensor:
        return self._sums(name, exchange).view(self.group.size, exchange.padded, self.shape.hidden_size)


def warn_of_kernels(nccl: tuple[int, ...]) -> None:
    """Warn if this NCCL has no copy-engine collectives and silently launches kernels instead."""
    if nccl < _COPY_ENGINES_SINCE:
        warn_once(
            f"NCCL {'.'.join(map(str, nccl))} has no collectives by copy engines, so nccl-zero-cta launches kernels",
            cost="it takes SMs from compute, and is not a baseline for copy-engine",
            remedy=f"use a torch with NCCL {'.'.join(map(str, _COPY_ENGINES_SINCE))} or later",
        )
