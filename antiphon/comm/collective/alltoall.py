"""`alltoall`: counts, then a variable all-to-all with one copy of a token for each destination rank.

    dispatch   tokens ordered by destination rank ──counts──► ──rows──►  rows ordered by source rank
    combine    partial sums go back the same way; the owner adds them in float32 at least, in order of rank

The counts must be on the host before the rows can be sent. On the CPU, where compute blocks the host anyway, both are
sent in `dispatch`.
"""

from __future__ import annotations

import torch

from antiphon.comm.collective.counts import check_lanes, wait_for_counts
from antiphon.comm.collective.routed_exchange import RoutedExchange
from antiphon.comm.group import Collective, RankGroup
from antiphon.comm.row_format import LaneBuffers, RowFormat
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Flight, Transport, TransportPart
from antiphon.runtime import Streams


class AllToAllTransport(Transport):
    """Exact routing over the process group's variable all-to-all."""

    name = "alltoall"

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
        self._buffers = [LaneBuffers(torch.device("cpu")) for _ in range(num_lanes)]
        self._exchanges: list[RoutedExchange | None] = [None] * num_lanes

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        exchange = self._exchange_for(lane, routes, label)
        buffers, row = self._buffers[lane], self._format
        packed = buffers.get("packed", sum(exchange.sent), row.row_bytes, torch.uint8)
        if self.part is not TransportPart.LINK_ONLY:
            tokens_N = exchange.tokens_N
            row.pack(packed, x_TD[tokens_N], Routes(routes.ids_TK[tokens_N], routes.weights_TK[tokens_N]))
        received = buffers.get("received", sum(exchange.received), row.row_bytes, torch.uint8)
        work = self._send(received, packed, label, out_splits=exchange.received, in_splits=exchange.sent)

        def wait() -> Rows:
            if work is not None:
                work.wait()
            return self.rows(row.x(received), row.ids(received), row.weights(received))

        num_bytes = exchange.remote_rows(self.group.rank) * row.row_bytes
        ready_ns = None if work is None else work.ready_ns
        return Flight(wait=wait, ready_ns=ready_ns, num_bytes=num_bytes, num_messages=2)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        exchange = self._exchanges[lane]
        assert exchange is not None
        hidden_size, dtype = self.shape.hidden_size, self.shape.dtype
        buffers = self._buffers[lane]
        partials = buffers.get("partials", sum(exchange.received), hidden_size, dtype)
        self.keep_sums(partials, partial_RD)
        home = buffers.get("home", sum(exchange.sent), hidden_size, dtype)
        work = self._send(home, partials, label, out_splits=exchange.sent, in_splits=exchange.received)

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            if self.part is TransportPart.LINK_ONLY:
                return home[: exchange.num_tokens]
            return exchange.add_home(home)

        num_bytes = exchange.remote_rows(self.group.rank) * hidden_size * dtype.itemsize
        return Flight(wait=wait, ready_ns=None if work is None else work.ready_ns, num_bytes=num_bytes)

    def _send(
        self, out: torch.Tensor, rows: torch.Tensor, label: str, *, out_splits: list[int], in_splits: list[int]
    ) -> Collective | None:
        if self.part is TransportPart.COMPUTE_ONLY:
            return None
        with self.streams.comm(after=self.streams.record()):
            return self.group.all_to_all(out, rows, label, out_splits=out_splits, in_splits=in_splits)

    def _exchange_for(self, lane: int, routes: Routes, label: str) -> RoutedExchange:
        """Planned from the routes; where one part alone is measured, that of the lane's last whole dispatch."""
        exchange = self._exchanges[lane]
        if self.part is TransportPart.WHOLE or exchange is None:
            exchange = self._exchanges[lane] = self._plan_exchange(lane, routes, label)
        elif self.part is TransportPart.COMPUTE_ONLY:
            self._order_by_rank(routes)  # its time belongs to the computation
        return exchange

    def _order_by_rank(self, routes: Routes) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for each rank [W], and the token of every row, ordered by destination rank [N]."""
        reached_TW = torch.zeros(routes.ids_TK.shape[0], self.group.size, dtype=torch.bool, device="cpu")
        reached_TW.scatter_(1, routes.ids_TK // self.experts_per_rank, True)
        return reached_TW.sum(0), reached_TW.t().nonzero()[:, 1]

    def _plan_exchange(self, lane: int, routes: Routes, label: str) -> RoutedExchange:
        sent_W, tokens_N = self._order_by_rank(routes)
        sent_W2 = torch.stack([sent_W, torch.full_like(sent_W, lane)], dim=1)
        received_W2 = torch.empty_like(sent_W2)
        ones = [1] * self.group.size
        label = f"counts of {label}"
        work = self.group.all_to_all(received_W2, sent_W2, label, out_splits=ones, in_splits=ones)
        wait_for_counts(work, label)
        received, lanes = received_W2.T.tolist()
        check_lanes(lanes, lane, label)
        return RoutedExchange(
            num_tokens=routes.ids_TK.shape[0], tokens_N=tokens_N, sent=sent_W.tolist(), received=received
        )
