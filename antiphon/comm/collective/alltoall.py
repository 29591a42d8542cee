"""`alltoall`: an exchange of counts, then a variable all-to-all with one copy of a token per destination rank.

    dispatch   tokens ordered by destination rank ──counts──► ──rows──►  rows ordered by source rank
    combine    partial sums go back the same way; the owner adds them in float32 at least, in rank order

The host needs the counts before it can send the rows. On the CPU, where compute blocks the host anyway, `dispatch`
sends both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from antiphon.comm.collective.transport import CollectiveTransport
from antiphon.comm.group import Work
from antiphon.comm.stepwise import arrived_counts, flight_of
from antiphon.comm.tokens import Routes, Rows
from antiphon.comm.transport import Flight
from antiphon.runtime import Event


def reached_ranks(ids_TK: torch.Tensor, experts_per_rank: int, num_ranks: int) -> torch.Tensor:
    """Which ranks each token goes to: bool [T, W]. Padding, whose ids are -1, goes nowhere."""
    ranks_TK = (ids_TK // experts_per_rank).to(torch.int64) % (num_ranks + 1)  # -1 becomes a rank past the last one
    reached_TW = torch.zeros(ids_TK.shape[0], num_ranks + 1, dtype=torch.bool, device=ids_TK.device)
    return reached_TW.scatter_(1, ranks_TK, True)[:, :num_ranks]


@dataclass(slots=True, kw_only=True)
class RoutedExchange:
    """Rows by destination and source rank.

    `received` is filled in once the counts have arrived; on devices that queue their work, `sent` is too.
    """

    lane: int
    num_tokens: int
    tokens_N: torch.Tensor  # token of every row, ordered by destination rank; only the first sum(sent) are sent
    sent_W: torch.Tensor  # rows sent to each rank, on the device of the routes
    sent: list[int] = field(default_factory=list)  # the same on the host
    received: list[int] = field(default_factory=list)  # rows received from each rank

    def remote_rows(self, rank: int) -> int:
        """Rows sent to ranks other than `rank`, or received from them, whichever is more."""
        return max(sum(rows) - rows[rank] for rows in (self.sent, self.received))


class AllToAllTransport(CollectiveTransport[RoutedExchange]):
    """Exact routing over the process group's variable all-to-all."""

    name = "alltoall"
    capture_obstacle = "the host reads the counts of rows before it can send them"
    wants_counts = False  # it exchanges its own counts of rows

    def plan(self, lane: int, routes: Routes, tokens_by_rank: tuple[int, ...] | None) -> RoutedExchange:
        reached_TW = reached_ranks(routes.ids_TK, self.experts_per_rank, self.group.size)
        sent_W = reached_TW.sum(0)
        tokens_N = self._by_destination(reached_TW)
        return RoutedExchange(lane=lane, num_tokens=routes.ids_TK.shape[0], tokens_N=tokens_N, sent_W=sent_W)

    def pack(self, exchange: RoutedExchange, x_TD: torch.Tensor, routes: Routes) -> None:
        tokens_N = exchange.tokens_N
        ordered = Routes(routes.ids_TK[tokens_N], routes.weights_TK[tokens_N])
        self._format.pack(self._rows("packed", exchange.lane, len(tokens_N)), x_TD[tokens_N], ordered)

    def send(self, exchange: RoutedExchange, label: str) -> Flight[None]:
        num_messages = 1
        if not exchange.received:
            self._count(exchange, f"counts of {label}")
            num_messages = 2
        return flight_of(
            self._send_rows(exchange, label, after=self.streams.record()),
            num_bytes=exchange.remote_rows(self.group.rank) * self._format.row_bytes,
            num_messages=num_messages,
        )

    def rows_of(self, exchange: RoutedExchange) -> Rows:
        received, row = self._rows("received", exchange.lane, sum(exchange.received)), self._format
        return self.rows(row.x(received), row.ids(received), row.weights(received), self.partials_of(exchange))

    def partials_of(self, exchange: RoutedExchange) -> torch.Tensor:
        return self._sums("partials", exchange.lane, sum(exchange.received))

    def send_back(self, exchange: RoutedExchange, label: str) -> Flight[None]:
        home_ND = self._sums("home", exchange.lane, sum(exchange.sent))
        splits = {"out_splits": exchange.sent, "in_splits": exchange.received}
        with self.streams.comm(after=self.streams.record()):
            work = self._link.all_to_all(home_ND, self.partials_of(exchange), label, **splits)
        return flight_of(work, num_bytes=exchange.remote_rows(self.group.rank) * self._sum_bytes)

    def add(self, exchange: RoutedExchange) -> torch.Tensor:
        """Add the sums in rank order, in float32 at least."""
        home_ND = self._sums("home", exchange.lane, sum(exchange.sent))
        wide = self.shape.weight_dtype
        out_TD = torch.zeros(exchange.num_tokens, self.shape.hidden_size, dtype=wide, device=home_ND.device)
        tokens_N = exchange.tokens_N[: sum(exchange.sent)]
        for tokens, rows in zip(torch.split(tokens_N, exchange.sent), torch.split(home_ND, exchange.sent), strict=True):
            out_TD.index_add_(0, tokens, rows.to(wide))
        return out_TD.to(self.shape.dtype)

    def _by_destination(self, reached_TW: torch.Tensor) -> torch.Tensor:
        """The token of every row, ordered by destination rank."""
        return reached_TW.t().nonzero()[:, 1]

    def _count(self, exchange: RoutedExchange, label: str) -> None:
        """Exchange the numbers of rows. The host waits."""
        sent_W2 = torch.stack([exchange.sent_W, torch.full_like(exchange.sent_W, exchange.lane)], dim=1)
        received_W2 = torch.empty_like(sent_W2)
        ones = [1] * self.group.size
        work = self.group.all_to_all(received_W2, sent_W2, label, out_splits=ones, in_splits=ones)
        exchange.received = arrived_counts(work, received_W2, exchange.lane, label)
        exchange.sent = exchange.sent_W.tolist()

    def _send_rows(self, exchange: RoutedExchange, label: str, *, after: Event) -> Work:
        received = self._rows("received", exchange.lane, sum(exchange.received))
        packed = self._rows("packed", exchange.lane, sum(exchange.sent))
        splits = {"out_splits": exchange.received, "in_splits": exchange.sent}
        with self.streams.comm(after=after):
            return self._link.all_to_all(received, packed, label, **splits)
