"""`alltoall`: counts, then a variable all-to-all with one copy of a token for each destination rank.

    dispatch   tokens ordered by destination rank ──counts──► ──rows──►  rows ordered by source rank
    combine    partial sums go back the same way; the owner adds them in float32 at least, in order of rank

The counts must be on the host before the rows can be sent. On the CPU, where compute blocks the host anyway, both are
sent in `dispatch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.comm.group import Collective, RankGroup
from antiphon.comm.row_format import LaneBuffers, RowFormat
from antiphon.comm.transport import (
    DEFAULT_MAX_TOKENS,
    ExpertShape,
    Flight,
    Routes,
    Rows,
    Transport,
    TransportPart,
    wait_for_counts,
)
from antiphon.runtime import Streams

__all__ = ["AllToAllTransport"]


@dataclass(slots=True, kw_only=True)
class _Exchange:
    """What combine must know of the dispatch that it answers."""

    num_tokens: int
    tokens_N: torch.Tensor  # token of every row sent, ordered by destination rank
    sent: list[int]  # rows sent to each rank
    received: list[int]  # rows received from each rank


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
        self._exchanges: list[_Exchange | None] = [None] * num_lanes

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

        num_bytes = self._remote_rows(exchange) * row.row_bytes
        ready_ns = None if work is None else work.ready_ns
        return Flight(wait=wait, ready_ns=ready_ns, num_bytes=num_bytes, num_messages=2)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        exchange = self._exchanges[lane]
        assert exchange is not None
        hidden_size, dtype = self.shape.hidden_size, self.shape.dtype
        buffers = self._buffers[lane]
        partials = buffers.get("partials", sum(exchange.received), hidden_size, dtype)
        if self.part is not TransportPart.LINK_ONLY:
            partials.copy_(partial_RD)
        home = buffers.get("home", sum(exchange.sent), hidden_size, dtype)
        work = self._send(home, partials, label, out_splits=exchange.sent, in_splits=exchange.received)

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            if self.part is TransportPart.LINK_ONLY:
                return home[: exchange.num_tokens]
            return self._add_in_rank_order(home, exchange)

        num_bytes = self._remote_rows(exchange) * hidden_size * dtype.itemsize
        return Flight(wait=wait, ready_ns=None if work is None else work.ready_ns, num_bytes=num_bytes)

    def _send(
        self, out: torch.Tensor, rows: torch.Tensor, label: str, *, out_splits: list[int], in_splits: list[int]
    ) -> Collective | None:
        if self.part is TransportPart.COMPUTE_ONLY:
            return None
        with self.streams.comm(after=self.streams.record()):
            return self.group.all_to_all(out, rows, label, out_splits=out_splits, in_splits=in_splits)

    def _exchange_for(self, lane: int, routes: Routes, label: str) -> _Exchange:
        """Planned from the routes; where one part alone is measured, that of the lane's last whole dispatch."""
        exchange = self._exchanges[lane]
        if self.part is TransportPart.WHOLE or exchange is None:
            exchange = self._exchanges[lane] = self._plan_exchange(routes, label)
        elif self.part is TransportPart.COMPUTE_ONLY:
            self._order_by_rank(routes)  # its time belongs to the computation
        return exchange

    def _order_by_rank(self, routes: Routes) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for each rank [W], and the token of every row, ordered by destination rank [N]."""
        reached_TW = torch.zeros(routes.ids_TK.shape[0], self.group.size, dtype=torch.bool)
        reached_TW.scatter_(1, routes.ids_TK // self.experts_per_rank, True)
        return reached_TW.sum(0), reached_TW.t().nonzero()[:, 1]

    def _plan_exchange(self, routes: Routes, label: str) -> _Exchange:
        sent_W, tokens_N = self._order_by_rank(routes)
        received_W = torch.empty_like(sent_W)
        ones = [1] * self.group.size
        label = f"counts of {label}"
        work = self.group.all_to_all(received_W, sent_W, label, out_splits=ones, in_splits=ones)
        wait_for_counts(work, label)
        return _Exchange(
            num_tokens=routes.ids_TK.shape[0],
            tokens_N=tokens_N,
            sent=sent_W.tolist(),
            received=received_W.tolist(),
        )

    def _add_in_rank_order(self, home_ND: torch.Tensor, exchange: _Exchange) -> torch.Tensor:
        wide = self.shape.weight_dtype
        out_TD = torch.zeros(exchange.num_tokens, self.shape.hidden_size, dtype=wide)
        for tokens, rows in zip(
            torch.split(exchange.tokens_N, exchange.sent), torch.split(home_ND, exchange.sent), strict=True
        ):
            out_TD.index_add_(0, tokens, rows.to(wide))
        return out_TD.to(self.shape.dtype)

    def _remote_rows(self, exchange: _Exchange) -> int:
        mine = self.group.rank
        return max(sum(rows) - rows[mine] for rows in (exchange.sent, exchange.received))
