"""The slab protocol: dense dispatch and combine over a mailbox, the same for every medium.

    dispatch   my tokens, packed into my own slab of my box ──put──► the same place in every peer's box
    experts    read the whole box: one row for every token of every rank, in order of rank
    combine    for every peer the sums of its tokens ──put──► my slab in its box; the owner adds up in order of rank

All tokens go to all ranks: with a top-k that is large against the number of ranks exact routing would save little
(docs/facts.md), and no counts have to be exchanged. Slabs are as long as their rank has tokens, which the agreement
knows. `mailbox` says why no barrier is needed.

Shapes: `T` tokens of this rank, `D` hidden size, `R` tokens of all ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import accumulate

import torch

from antiphon.comm.group import RankGroup
from antiphon.comm.mailbox import Arrival, Exchange, Mailbox, Phase, Put
from antiphon.comm.mailbox_log import MailboxLog
from antiphon.comm.row_format import RowFormat
from antiphon.comm.transport import (
    DEFAULT_MAX_TOKENS,
    ExpertShape,
    Flight,
    Routes,
    Rows,
    Transport,
    TransportPart,
    exchange_counts,
)
from antiphon.runtime import Streams

__all__ = ["SlabTransport"]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which rows of a box belong to which rank."""

    tokens_by_rank: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.tokens_by_rank)


class SlabTransport(Transport):
    """Dispatch and combine over `mailbox`, which an implementation makes in `_make_mailbox`."""

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
        self._sum_bytes = shape.hidden_size * shape.dtype.itemsize
        rows = group.size * max_tokens
        self.mailbox = self._make_mailbox(rows * self._format.row_bytes, rows * self._sum_bytes)
        with torch.inference_mode(False):  # usable inside of it and outside
            self._partials = [
                torch.empty(rows, shape.hidden_size, dtype=shape.dtype, device=streams.device) for _ in range(num_lanes)
            ]
        self._peers = [(group.rank + step) % group.size for step in range(1, group.size)]
        self._layouts: list[_Layout | None] = [None] * num_lanes
        self._exchanges: list[list[Exchange | None]] = [[None, None] for _ in range(num_lanes)]
        self._log: MailboxLog | None = None

    def last_exchange(self, lane: int, phase: Phase) -> Exchange | None:
        """What went over the link last, for tests and reports."""
        return self._exchanges[lane][phase]

    def record_into(self, log: MailboxLog) -> None:
        """Log what is queued from now on, for `antiphon.timeline.happens_before.check`. No exchange may be under way.

        All ranks call it between the same two exchanges; `part` stays `TransportPart.WHOLE`.
        """
        self.mailbox.record_into(log)
        for lane, sums in enumerate(self._partials):
            num_bytes = sums.numel() * sums.element_size()
            log.name_memory(sums.data_ptr(), num_bytes, f"partial sums of rank {self.group.rank}, lane {lane}")
        self._log = log

    @abstractmethod
    def _make_mailbox(self, dispatch_bytes: int, combine_bytes: int) -> Mailbox:
        """All ranks call it at once. The sizes are those of a lane's boxes."""

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        if tokens_by_rank is None:
            tokens_by_rank = exchange_counts(self.group, x_TD.shape[0], label)
        layout = _Layout(tokens_by_rank, (0, *accumulate(tokens_by_rank[:-1])))
        assert tokens_by_rank[self.group.rank] == x_TD.shape[0], f"{tokens_by_rank} is not for {x_TD.shape[0]} tokens"
        self._layouts[lane] = layout
        row_bytes = self._format.row_bytes
        box = self.mailbox.box(lane, Phase.DISPATCH)
        rows = box[: layout.num_rows * row_bytes].view(-1, row_bytes)
        mine = self._part_of(rows, layout, self.group.rank)
        if self.part is not TransportPart.LINK_ONLY:
            self._format.pack(mine, x_TD, routes)

        def slab(rank: int) -> tuple[int, int]:
            return layout.starts[rank] * row_bytes, layout.tokens_by_rank[rank] * row_bytes

        source, (offset, num_bytes) = mine.view(-1), slab(self.group.rank)
        exchange = Exchange(
            lane=lane,
            phase=Phase.DISPATCH,
            label=label,
            puts=tuple(Put(peer, source, offset) for peer in self._peers),
            arrivals=tuple(Arrival(peer, *slab(peer)) for peer in self._peers),
            same_source=True,
        )
        if self._log is not None:
            self._log.packed(exchange, mine)
        self._send(exchange)

        def wait() -> Rows:
            self._receive(exchange)
            partials_RD = self._partials[lane][: layout.num_rows]
            if self._log is not None:
                self._log.experts(lane, rows, partials_RD, label)
            return self.rows(self._format.x(rows), self._format.ids(rows), self._format.weights(rows), partials_RD)

        received = sum(arrival.num_bytes for arrival in exchange.arrivals)
        return self._flight(wait, exchange, max(received, num_bytes * len(self._peers)))

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        layout = self._layouts[lane]
        assert layout is not None
        rank, num_tokens = self.group.rank, layout.tokens_by_rank[self.group.rank]
        partials_RD = self._partials[lane][: layout.num_rows]
        if self.part is not TransportPart.LINK_ONLY and partial_RD.data_ptr() != partials_RD.data_ptr():
            partials_RD.copy_(partial_RD)
        my_bytes = num_tokens * self._sum_bytes
        exchange = Exchange(
            lane=lane,
            phase=Phase.COMBINE,
            label=label,
            puts=tuple(
                Put(
                    peer,
                    self._part_of(partials_RD, layout, peer).view(-1).view(torch.uint8),
                    rank * layout.tokens_by_rank[peer] * self._sum_bytes,
                )
                for peer in self._peers
            ),
            arrivals=tuple(Arrival(peer, peer * my_bytes, my_bytes) for peer in self._peers),
            same_source=False,
        )
        if self._log is not None:
            box = self.mailbox.box(lane, Phase.DISPATCH)
            self._log.experts(lane, box[: layout.num_rows * self._format.row_bytes], partials_RD, label)
        self._send(exchange)

        def wait() -> torch.Tensor:
            self._receive(exchange)
            own_TD = self._part_of(partials_RD, layout, rank)
            if self.part is TransportPart.LINK_ONLY:
                return own_TD
            box = self.mailbox.box(lane, Phase.COMBINE)[: self.group.size * my_bytes]
            home_WTD = box.view(self.shape.dtype).view(self.group.size, num_tokens, self.shape.hidden_size)
            parts = [own_TD if r == rank else home_WTD[r] for r in range(self.group.size)]
            if self._log is not None:
                self._log.summed(exchange, parts)
            return self._add(parts)

        sent = sum(put.source.numel() for put in exchange.puts)
        return self._flight(wait, exchange, max(sent, my_bytes * len(self._peers)))

    def _send(self, exchange: Exchange) -> None:
        self._exchanges[exchange.lane][exchange.phase] = exchange
        if self.part is not TransportPart.COMPUTE_ONLY:
            self.mailbox.put(exchange)
            self.mailbox.signal(exchange)

    def _receive(self, exchange: Exchange) -> None:
        if self.part is not TransportPart.COMPUTE_ONLY:
            self.mailbox.wait(exchange)
            self.mailbox.reset(exchange)

    def _flight(self, wait: object, exchange: Exchange, num_bytes: int) -> Flight:  # type: ignore[type-arg]
        return Flight(
            wait=wait,  # type: ignore[arg-type]
            ready_ns=self.mailbox.ready_ns(exchange),
            num_bytes=num_bytes,
            num_messages=int(bool(self._peers)),
        )

    @staticmethod
    def _part_of(rows: torch.Tensor, layout: _Layout, rank: int) -> torch.Tensor:
        start = layout.starts[rank]
        return rows[start : start + layout.tokens_by_rank[rank]]

    def _add(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The sum in order of rank, in float32 at least, rounded once."""
        if len(parts) == 1:
            return parts[0].clone()
        if len(parts) == 2:  # an addition of two is computed wide and rounded once on every device
            return torch.add(*parts)
        wide = parts[0].to(self.shape.weight_dtype, copy=True)
        for part in parts[1:]:
            wide += part
        return wide.to(self.shape.dtype)
