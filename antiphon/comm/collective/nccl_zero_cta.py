"""`nccl-zero-cta`: all-gather and all-to-all by NCCL's own copy-engine collectives, as a baseline for `copy-engine`.

NCCL moves a collective by copy engines, without a kernel, if the communicator's CTA policy is ZERO, the buffers lie in
a registered symmetric window, and the stream is not the legacy default one (NCCL 2.28 and newer; docs/facts.md). There
is no such reduce-scatter, so partial sums travel as they are, and their owner adds them in rank order.

    dispatch               tokens packed into this rank's part of the gathered rows ── all-gather in place
    combine, two ranks     the peer's sums copied into this rank's part ── all-gather in place
    combine, more ranks    all-to-all
"""

from __future__ import annotations

from typing import Unpack

import torch

from antiphon.comm import needs
from antiphon.comm.collective.allgather import AllGatherTransport, PaddedExchange
from antiphon.comm.collective.nccl import NcclGroup
from antiphon.comm.group import Collectives
from antiphon.comm.needs import Refusal, World
from antiphon.comm.stepwise import flight_of
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import Flight, MadeFor
from antiphon.core.errors import OptionError
from antiphon.core.warn_once import warn_once
from antiphon.kernels.pack import add_in_rank_order
from antiphon.machine.facts import Facts
from antiphon.runtime import CudaStreams

_COPY_ENGINES_SINCE = (2, 28)


class NcclZeroCtaTransport(AllGatherTransport):
    """Every rank gets all tokens. Needs NVLink between all ranks."""

    name = "nccl-zero-cta"
    capture_obstacle = "it is a baseline for eager steps, and its registered windows were never captured"

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        return (
            needs.gpus(world)
            or needs.library(facts, world, "nccl")
            or needs.refusal_for(needs.missing_peer_access(facts, world))
        )

    def __init__(self, shape: ExpertShape, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, **made_for)
        rows = self.group.size * self.max_tokens
        window_bytes = {
            "gathered": rows * self._format.row_bytes,
            "home": rows * self._sum_bytes,
            "partials": rows * self._sum_bytes,
        }
        names = [(name, lane) for lane in range(self.num_lanes) for name in window_bytes]
        buffers = self._nccl.symmetric_buffers([window_bytes[name] for name, _ in names])
        self._windows = dict(zip(names, buffers, strict=True))

    def _connect(self, max_ctas: int | None) -> Collectives:
        if not isinstance(self.streams, CudaStreams):
            raise OptionError(
                f"transport {self.name!r} needs CUDA devices, not {self.streams.device}",
                remedy="use allgather",
                option="transport",
                value=self.name,
            )
        warn_of_kernels(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        self._nccl = NcclGroup.shared(self.group, self.streams, zero_cta=True)
        return self._nccl

    def send(self, exchange: PaddedExchange, label: str) -> Flight[None]:
        return super().send(exchange, label) if exchange.padded else flight_of(None, num_bytes=0)

    def keep(self, exchange: PaddedExchange, partial_RD: torch.Tensor) -> None:
        super().keep(exchange, partial_RD)
        if self.group.size == 2:
            peer_TD = self._by_rank(self.partials_of(exchange))[1 - self.group.rank]
            self._by_rank(self._home(exchange))[self.group.rank].copy_(peer_TD)

    def send_back(self, exchange: PaddedExchange, label: str) -> Flight[None]:
        if not exchange.padded:
            return flight_of(None, num_bytes=0)
        if self.group.size != 2:
            return super().send_back(exchange, label)
        home = self._home(exchange)
        with self.streams.comm(after=self.streams.record()):
            work = self._link.all_gather(home, self._by_rank(home)[self.group.rank], label)
        return flight_of(work, num_bytes=self._combine_bytes(exchange))

    def add(self, exchange: PaddedExchange) -> torch.Tensor:
        rank, home_WTD = self.group.rank, self._by_rank(self._home(exchange))
        sums_WTD = self._by_rank(self.partials_of(exchange))
        sums = [(sums_WTD if source == rank else home_WTD)[source] for source in range(self.group.size)]
        return add_in_rank_order([sum_TD[: exchange.num_tokens] for sum_TD in sums])

    def _packed(self, exchange: PaddedExchange) -> torch.Tensor:
        """This rank's part of the gathered rows."""
        rows = self._gathered(exchange)
        return rows[self.group.rank * exchange.padded :][: exchange.padded]

    def _rows(self, name: str, lane: int, num_rows: int) -> torch.Tensor:
        row_bytes = self._format.row_bytes
        return self._windows[name, lane][: num_rows * row_bytes].view(num_rows, row_bytes)

    def _sums(self, name: str, lane: int, num_rows: int) -> torch.Tensor:
        window = self._windows[name, lane][: num_rows * self._sum_bytes]
        return window.view(self.shape.dtype).view(num_rows, self.shape.hidden_size)

    def _by_rank(self, sums: torch.Tensor) -> torch.Tensor:
        return sums.view(self.group.size, -1, self.shape.hidden_size)


def warn_of_kernels(nccl: tuple[int, ...]) -> None:
    """Warn if this NCCL has no copy-engine collectives and silently launches kernels instead."""
    if nccl < _COPY_ENGINES_SINCE:
        warn_once(
            f"NCCL {'.'.join(map(str, nccl))} has no copy-engine collectives, so nccl-zero-cta launches kernels",
            cost="it takes SMs from compute and is no baseline for copy-engine",
            remedy=f"use a torch with NCCL {'.'.join(map(str, _COPY_ENGINES_SINCE))} or later",
        )
