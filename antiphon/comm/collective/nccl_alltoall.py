"""`alltoall` on CUDA devices, by NCCL: exact routing, with the counts on the host one switch later.

    dispatch   tokens packed by destination rank; counts exchanged and copied to the host   (comm stream)
    launch     behind the lane's switch: the host waits for the counts, then the rows go    (late launch)
    combine    sums go back the same way; the owner adds them in float32 at least, in order of rank

What is packed is for the worst case, because the host does not know the counts yet: a row for every token and rank,
those that go somewhere in front.
"""

from __future__ import annotations

import torch

from antiphon.comm import needs
from antiphon.comm.collective.alltoall import RoutedExchange, reached_ranks
from antiphon.comm.collective.nccl import NcclCollective, NcclGroup
from antiphon.comm.group import RankGroup
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import LaneBuffers, RowFormat
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Flight, Transport, TransportPart
from antiphon.core.errors import OptionError
from antiphon.machine.facts import Facts
from antiphon.runtime import CudaStreams, Streams


class NcclAllToAllTransport(Transport):
    """Exact routing over NCCL's variable all-to-all. max_ctas: see `NcclGroup`."""

    name = "alltoall"

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
        if not isinstance(streams, CudaStreams):
            raise OptionError(f"NCCL needs CUDA devices, not {streams.device}")
        self._format = RowFormat(shape)
        self._buffers = [LaneBuffers(streams.device) for _ in range(num_lanes)]
        self._exchanges: list[RoutedExchange | None] = [None] * num_lanes
        self._nccl = NcclGroup.of(group, streams, max_ctas=max_ctas)
        self.num_sms = max_ctas or 0
        rows = group.size * max_tokens
        for buffers in self._buffers:  # at once, so that the memory that is left can be measured
            for name in ("packed", "received"):
                buffers.get(name, rows, self._format.row_bytes, torch.uint8)
            for name in ("partials", "home"):
                buffers.get(name, rows, shape.hidden_size, shape.dtype)
        with torch.inference_mode(False):
            self._counts = [
                torch.zeros(2, group.size, dtype=torch.int64, device="cpu", pin_memory=True) for _ in range(num_lanes)
            ]

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        if self.part is not TransportPart.WHOLE and self._exchanges[lane] is not None:
            return self._measured_dispatch(lane, x_TD, routes, label)
        num_ranks, num_tokens = self.group.size, x_TD.shape[0]
        buffers, row, counts = self._buffers[lane], self._format, self._counts[lane]
        reached_TW = self._reached(routes)
        exchange = RoutedExchange(num_tokens=num_tokens, tokens_N=_front_first(reached_TW))
        self._exchanges[lane] = exchange
        packed = buffers.get("packed", num_ranks * num_tokens, row.row_bytes, torch.uint8)
        self._pack(packed, x_TD, routes, exchange.tokens_N)
        most_rows = sum(tokens_by_rank) if tokens_by_rank is not None else num_ranks * self.max_tokens
        received = buffers.get("received", most_rows, row.row_bytes, torch.uint8)
        counts_2W = buffers.get("counts", 2, num_ranks, torch.int64)
        counts_2W[0].copy_(reached_TW.sum(0))
        ready = self.streams.record()
        with self.streams.comm(after=ready):
            ones = [1] * num_ranks
            self._nccl.all_to_all(counts_2W[1], counts_2W[0], f"counts of {label}", out_splits=ones, in_splits=ones)
            counts.copy_(counts_2W, non_blocking=True)
            counted = self.streams.record()
        work: NcclCollective | None = None

        def launch() -> None:
            nonlocal work
            counted.synchronize()  # type: ignore[attr-defined]  # the device watch limits it
            exchange.sent, exchange.received = counts.tolist()
            flight.num_bytes = exchange.remote_rows(self.group.rank) * row.row_bytes
            with self.streams.comm(after=ready):
                work = self._rows_away(received, packed, exchange, label)

        def wait() -> Rows:
            assert work is not None
            work.wait()
            return self._rows(lane, received, exchange)

        flight = Flight(wait=wait, launch=launch, num_messages=2)
        return flight

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        exchange = self._exchanges[lane]
        assert exchange is not None
        hidden_size, dtype = self.shape.hidden_size, self.shape.dtype
        partials_RD = self._partials(lane, exchange)
        self.keep_sums(partials_RD, partial_RD)
        home = self._buffers[lane].get("home", sum(exchange.sent), hidden_size, dtype)
        work: NcclCollective | None = None
        if self.part is not TransportPart.COMPUTE_ONLY:
            with self.streams.comm(after=self.streams.record()):
                work = self._nccl.all_to_all(
                    home, partials_RD, label, out_splits=exchange.sent, in_splits=exchange.received
                )

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            if self.part is TransportPart.LINK_ONLY:
                return home[: exchange.num_tokens]
            return exchange.add_home(home)

        return Flight(wait=wait, num_bytes=exchange.remote_rows(self.group.rank) * hidden_size * dtype.itemsize)

    def _measured_dispatch(self, lane: int, x_TD: torch.Tensor, routes: Routes, label: str) -> Flight[Rows]:
        """One part alone, with the counts of the last whole dispatch of the lane."""
        exchange = self._exchanges[lane]
        assert exchange is not None
        buffers, row = self._buffers[lane], self._format
        packed = buffers.get("packed", self.group.size * exchange.num_tokens, row.row_bytes, torch.uint8)
        received = buffers.get("received", sum(exchange.received), row.row_bytes, torch.uint8)
        work: NcclCollective | None = None
        if self.part is TransportPart.COMPUTE_ONLY:
            reached_TW = self._reached(routes)
            self._pack(packed, x_TD, routes, _front_first(reached_TW))
            reached_TW.sum(0)
        else:
            with self.streams.comm(after=self.streams.record()):
                work = self._rows_away(received, packed, exchange, label)

        def wait() -> Rows:
            if work is not None:
                work.wait()
            return self._rows(lane, received, exchange)

        return Flight(wait=wait)

    def _reached(self, routes: Routes) -> torch.Tensor:
        return reached_ranks(routes.ids_TK, self.experts_per_rank, self.group.size)

    def _pack(self, packed: torch.Tensor, x_TD: torch.Tensor, routes: Routes, tokens_N: torch.Tensor) -> None:
        self._format.pack(packed, x_TD[tokens_N], Routes(routes.ids_TK[tokens_N], routes.weights_TK[tokens_N]))

    def _rows_away(
        self, received: torch.Tensor, packed: torch.Tensor, exchange: RoutedExchange, label: str
    ) -> NcclCollective:
        return self._nccl.all_to_all(
            received[: sum(exchange.received)],
            packed[: sum(exchange.sent)],
            label,
            out_splits=exchange.received,
            in_splits=exchange.sent,
        )

    def _rows(self, lane: int, received: torch.Tensor, exchange: RoutedExchange) -> Rows:
        rows, row = received[: sum(exchange.received)], self._format
        return self.rows(row.x(rows), row.ids(rows), row.weights(rows), self._partials(lane, exchange))

    def _partials(self, lane: int, exchange: RoutedExchange) -> torch.Tensor:
        num_rows = sum(exchange.received)
        return self._buffers[lane].get("partials", num_rows, self.shape.hidden_size, self.shape.dtype)


def _front_first(reached_TW: torch.Tensor) -> torch.Tensor:
    """Tokens in order of destination rank: those of every rank that they reach in front, the others behind."""
    missed_N = ~reached_TW.t().flatten()
    return missed_N.to(torch.uint8).argsort(stable=True) % reached_TW.shape[0]
