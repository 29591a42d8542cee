"""`alltoall`: counts, then a variable all-to-all with one copy of a token for each destination rank.

    dispatch   tokens ordered by destination rank ──counts──► ──rows──►  rows ordered by source rank
    combine    partial sums go back the same way; the owner adds them in float32 at least, in order of rank

The counts must be on the host before the rows can be sent. On the CPU, where compute blocks the host anyway, both are
sent in `dispatch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from antiphon.comm import needs
from antiphon.comm.counts import check_lanes, wait_for_counts
from antiphon.comm.group import Collective, RankGroup
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import LaneBuffers, RowFormat
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Flight, Transport, TransportPart
from antiphon.machine.facts import Facts
from antiphon.runtime import Streams


def reached_ranks(ids_TK: torch.Tensor, experts_per_rank: int, num_ranks: int) -> torch.Tensor:
    """Which token goes to which rank: bool [T, W]. Padding, whose ids are -1, goes nowhere."""
    ranks_TK = (ids_TK // experts_per_rank).to(torch.int64) % (num_ranks + 1)  # -1 becomes a rank behind the last
    reached_TW = torch.zeros(ids_TK.shape[0], num_ranks + 1, dtype=torch.bool, device=ids_TK.device)
    return reached_TW.scatter_(1, ranks_TK, True)[:, :num_ranks]


@dataclass(slots=True, kw_only=True)
class RoutedExchange:
    """Rows by destination and source rank. A late launch fills in the counts."""

    num_tokens: int
    tokens_N: torch.Tensor  # token of every row sent, ordered by destination rank; the first sum(sent) count
    sent: list[int] = field(default_factory=list)  # rows sent to each rank
    received: list[int] = field(default_factory=list)  # rows received from each rank

    def remote_rows(self, rank: int) -> int:
        """Rows to or from other ranks than `rank`, whichever are more."""
        return max(sum(rows) - rows[rank] for rows in (self.sent, self.received))

    def add_home(self, home_ND: torch.Tensor) -> torch.Tensor:
        """The sums that came home for every token, added in order of rank, in float32 at least: [T, D], new."""
        wide = torch.promote_types(home_ND.dtype, torch.float32)
        out_TD = torch.zeros(self.num_tokens, home_ND.shape[1], dtype=wide, device=home_ND.device)
        tokens_N = self.tokens_N[: sum(self.sent)]
        for tokens, rows in zip(torch.split(tokens_N, self.sent), torch.split(home_ND, self.sent), strict=True):
            out_TD.index_add_(0, tokens, rows.to(wide))
        return out_TD.to(home_ND.dtype)


class AllToAllTransport(Transport):
    """Exact routing over the process group's variable all-to-all."""

    name = "alltoall"

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
        reached_TW = reached_ranks(routes.ids_TK, self.experts_per_rank, self.group.size)
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
