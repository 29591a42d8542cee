"""`allgather`: every rank gets all tokens, and the partial sums come home by reduce-scatter.

It is portable and exchanges no counts. Every rank pads to the largest number of tokens of any rank, which the agreement
knows; padding rows carry the expert id -1.

On the CPU the reduce-scatter is an all-to-all of equal parts. The receiver adds in float32 at least, in rank order: the
number of bytes is the same, the sum does not depend on timing, and it is faster than gloo's own reduce-scatter
(docs/log.md). On GPUs it is NCCL's, which adds in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import torch

from antiphon.comm.collective.queued import QueuedGroup
from antiphon.comm.collective.transport import CollectiveTransport
from antiphon.comm.stepwise import flight_of
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import Flight, MadeFor
from antiphon.kernels.pack import add_in_rank_order


@dataclass(slots=True, kw_only=True)
class PaddedExchange:
    """An exchange in which every rank sends as many rows as the rank with the most tokens."""

    lane: int
    num_tokens: int  # of this rank
    padded: int  # rows that every rank sends
    out_TD: torch.Tensor | None = None  # the result of a reduce-scatter, until the caller gets it


class AllGatherTransport(CollectiveTransport[PaddedExchange]):
    """All-gather of tokens, reduce-scatter of partial sums."""

    name = "allgather"
    capture_obstacle = "on CPUs the host itself moves the rows"

    def plan(self, lane: int, routes: Routes, tokens_by_rank: tuple[int, ...] | None) -> PaddedExchange:
        assert tokens_by_rank is not None
        return PaddedExchange(lane=lane, num_tokens=routes.ids_TK.shape[0], padded=max(tokens_by_rank))

    def pack(self, exchange: PaddedExchange, x_TD: torch.Tensor, routes: Routes) -> None:
        packed, row = self._packed(exchange), self._format
        row.pack(packed[: exchange.num_tokens], x_TD, routes)
        if exchange.num_tokens < exchange.padded:
            row.ids(packed)[exchange.num_tokens :] = -1

    def send(self, exchange: PaddedExchange, label: str) -> Flight[None]:
        gathered, packed = self._gathered(exchange), self._packed(exchange)
        with self.streams.comm(after=self.streams.record()):
            work = self._link.all_gather(gathered, packed, label)
        return flight_of(work, num_bytes=(self.group.size - 1) * exchange.padded * self._format.row_bytes)

    def rows_of(self, exchange: PaddedExchange) -> Rows:
        gathered, row = self._gathered(exchange), self._format
        return self.rows(row.x(gathered), row.ids(gathered), row.weights(gathered), self.partials_of(exchange))

    def partials_of(self, exchange: PaddedExchange) -> torch.Tensor:
        """The partial sums for the tokens of all ranks [W * padded, D]."""
        return self._sums("partials", exchange.lane, self.group.size * exchange.padded)

    def send_back(self, exchange: PaddedExchange, label: str) -> Flight[None]:
        equal = [exchange.padded] * self.group.size
        with self.streams.comm(after=self.streams.record()):
            work = self._link.all_to_all(
                self._home(exchange), self.partials_of(exchange), label, out_splits=equal, in_splits=equal
            )
        return flight_of(work, num_bytes=self._combine_bytes(exchange))

    def add(self, exchange: PaddedExchange) -> torch.Tensor:
        home_WTD = self._home(exchange).view(self.group.size, exchange.padded, self.shape.hidden_size)
        return add_in_rank_order([part[: exchange.num_tokens] for part in home_WTD])

    def _packed(self, exchange: PaddedExchange) -> torch.Tensor:
        """This rank's rows to send [padded, row_bytes]."""
        return self._rows("packed", exchange.lane, exchange.padded)

    def _gathered(self, exchange: PaddedExchange) -> torch.Tensor:
        """The rows of all ranks [W * padded, row_bytes]."""
        return self._rows("gathered", exchange.lane, self.group.size * exchange.padded)

    def _home(self, exchange: PaddedExchange) -> torch.Tensor:
        """The partial sums of this rank's tokens from all ranks [W * padded, D]."""
        return self._sums("home", exchange.lane, self.group.size * exchange.padded)

    def _combine_bytes(self, exchange: PaddedExchange) -> int:
        return (self.group.size - 1) * exchange.padded * self._sum_bytes


class QueuedAllGatherTransport(AllGatherTransport):
    """`AllGatherTransport` on devices that queue their work."""

    capture_obstacle = ""

    def __init__(self, shape: ExpertShape, *, max_ctas: int | None = None, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, max_ctas=max_ctas, **made_for)
        for lane in range(self.num_lanes):  # allocated now, so that the remaining memory can be measured
            largest = PaddedExchange(lane=lane, num_tokens=self.max_tokens, padded=self.max_tokens)
            self._packed(largest), self._gathered(largest), self.partials_of(largest)

    def send_back(self, exchange: PaddedExchange, label: str) -> Flight[None]:
        # The caller will own it. It is allocated on the compute stream, so that no work queued there still uses this
        # memory when the comm stream begins to write.
        exchange.out_TD = self._new_out(exchange)
        assert isinstance(self._link, QueuedGroup)
        with self.streams.comm(after=self.streams.record()):
            work = self._link.reduce_scatter(exchange.out_TD, self.partials_of(exchange), label)
        return flight_of(work, num_bytes=self._combine_bytes(exchange))

    def add(self, exchange: PaddedExchange) -> torch.Tensor:
        """Return the sums, which the reduce-scatter has already added."""
        out_TD, exchange.out_TD = exchange.out_TD, None
        return (self._new_out(exchange) if out_TD is None else out_TD)[: exchange.num_tokens]

    def freeze(self) -> None:
        for buffers in self._buffers:
            buffers.freeze()

    def before_replay(self) -> None:
        assert isinstance(self._link, QueuedGroup)
        self._link.before_replay()

    def _new_out(self, exchange: PaddedExchange) -> torch.Tensor:
        shape = (exchange.padded, self.shape.hidden_size)
        return torch.empty(shape, dtype=self.shape.dtype, device=self.streams.device)
