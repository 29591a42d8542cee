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
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, TypeVar

import torch

from antiphon.comm.counts import exchange_counts
from antiphon.comm.group import RankGroup
from antiphon.comm.needs import World
from antiphon.comm.row_format import RowFormat
from antiphon.comm.slab.log import MailboxLog
from antiphon.comm.slab.mailbox import Arrival, Exchange, Mailbox, Phase, Put
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Flight, Transport, TransportPart
from antiphon.kernels.pack import add_in_rank_order, pack_rows
from antiphon.runtime import Streams

T = TypeVar("T")


_KEPT_LAYOUTS = 64


@dataclass(slots=True, eq=False, kw_only=True)
class _Layout:
    """All that follows from the numbers of tokens of one lane: views of its buffers, and what goes where.

    Made once for each numbers of tokens, because making it takes the host longer than sending.
    """

    tokens_by_rank: tuple[int, ...]
    packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, weights and ids in my own slab
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, ids and weights of all ranks
    partials_RD: torch.Tensor
    home: list[torch.Tensor]  # the sums for my tokens [T, D], in order of rank; my own in its place
    dispatch: Exchange
    combine: Exchange


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
        self._layouts: list[dict[tuple[int, ...], _Layout]] = [{} for _ in range(num_lanes)]
        self._current: list[_Layout | None] = [None] * num_lanes  # of the last dispatch
        self._log: MailboxLog | None = None

    def last_exchange(self, lane: int, phase: Phase) -> Exchange | None:
        """That of the lane's last dispatch, or the one that answers it; for tests and reports."""
        layout = self._current[lane]
        return None if layout is None else (layout.dispatch, layout.combine)[phase]

    def record_into(self, log: MailboxLog) -> None:
        """Log what is queued from now on, for `antiphon.comm.slab.happens_before.check`. No exchange may be under way.

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
            tokens_by_rank = exchange_counts(self.group, x_TD.shape[0], lane=lane, label=label)
        layout = self._current[lane] = self._layout(lane, tokens_by_rank)
        if self.part is not TransportPart.LINK_ONLY:
            pack_rows(*layout.packed, x_TD, routes.weights_TK, routes.ids_TK)
        if self._log is not None:
            self._log.packed(layout.dispatch, layout.dispatch.puts[0].source)
        self._send(layout.dispatch, label)

        def wait() -> Rows:
            self._receive(layout.dispatch)
            if self._log is not None:
                self._log_experts(lane, layout, label)
            return self.rows(*layout.rows, layout.partials_RD)

        return self._flight(wait, layout.dispatch)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        layout = self._current[lane]
        assert layout is not None
        self.keep_sums(layout.partials_RD, partial_RD)
        if self._log is not None:
            self._log_experts(lane, layout, label)
        self._send(layout.combine, label)

        def wait() -> torch.Tensor:
            self._receive(layout.combine)
            if self.part is TransportPart.LINK_ONLY:
                return layout.home[self.group.rank]
            if self._log is not None:
                self._log.summed(layout.combine, layout.home)
            return add_in_rank_order(layout.home)

        return self._flight(wait, layout.combine)

    def _layout(self, lane: int, tokens_by_rank: tuple[int, ...]) -> _Layout:
        layouts = self._layouts[lane]
        layout = layouts.pop(tokens_by_rank, None)
        if layout is None:
            if len(layouts) >= _KEPT_LAYOUTS:
                layouts.pop(next(iter(layouts)))  # the one that was not used for the longest time
            with torch.inference_mode(False):
                layout = self._make_layout(lane, tokens_by_rank)
        layouts[tokens_by_rank] = layout  # in order of their last use
        return layout

    def _make_layout(self, lane: int, tokens_by_rank: tuple[int, ...]) -> _Layout:
        me, size, form = self.group.rank, self.group.size, self._format
        peers = [(me + step) % size for step in range(1, size)]
        starts = (0, *accumulate(tokens_by_rank))

        def part_of(rows: torch.Tensor, rank: int) -> torch.Tensor:
            return rows[starts[rank] : starts[rank + 1]]

        rows = self.mailbox.box(lane, Phase.DISPATCH)[: starts[-1] * form.row_bytes].view(-1, form.row_bytes)
        mine = part_of(rows, me)
        partials_RD = self._partials[lane][: starts[-1]]
        my_bytes = tokens_by_rank[me] * self._sum_bytes
        home = self.mailbox.box(lane, Phase.COMBINE)[: size * my_bytes].view(self.shape.dtype)
        home_WTD = home.view(size, tokens_by_rank[me], self.shape.hidden_size)
        return _Layout(
            tokens_by_rank=tokens_by_rank,
            packed=(form.x(mine), form.weights(mine), form.ids(mine)),
            rows=(form.x(rows), form.ids(rows), form.weights(rows)),
            partials_RD=partials_RD,
            home=[part_of(partials_RD, rank) if rank == me else home_WTD[rank] for rank in range(size)],
            dispatch=Exchange(
                lane=lane,
                phase=Phase.DISPATCH,
                puts=tuple(Put(peer, mine.view(-1), starts[me] * form.row_bytes) for peer in peers),
                arrivals=tuple(
                    Arrival(peer, starts[peer] * form.row_bytes, tokens_by_rank[peer] * form.row_bytes)
                    for peer in peers
                ),
                same_source=True,
            ),
            combine=Exchange(
                lane=lane,
                phase=Phase.COMBINE,
                puts=tuple(
                    Put(
                        peer,
                        part_of(partials_RD, peer).view(-1).view(torch.uint8),
                        me * tokens_by_rank[peer] * self._sum_bytes,
                    )
                    for peer in peers
                ),
                arrivals=tuple(Arrival(peer, peer * my_bytes, my_bytes) for peer in peers),
                same_source=False,
            ),
        )

    def _send(self, exchange: Exchange, label: str) -> None:
        exchange.label = label
        if self.part is not TransportPart.COMPUTE_ONLY:
            self.group.note(label, "slabs")
            self.mailbox.put(exchange)
            self.mailbox.signal(exchange)

    def _receive(self, exchange: Exchange) -> None:
        if self.part is not TransportPart.COMPUTE_ONLY:
            self.mailbox.wait(exchange)
            self.mailbox.reset(exchange)

    def _flight(self, wait: Callable[[], T], exchange: Exchange) -> Flight[T]:
        return Flight(
            wait=wait,
            ready_ns=self.mailbox.ready_ns(exchange),
            num_bytes=exchange.num_bytes,
            num_messages=int(bool(exchange.puts)),
        )

    def _log_experts(self, lane: int, layout: _Layout, label: str) -> None:
        assert self._log is not None
        num_bytes = sum(layout.tokens_by_rank) * self._format.row_bytes
        self._log.experts(lane, self.mailbox.box(lane, Phase.DISPATCH)[:num_bytes], layout.partials_RD, label)


class CudaSlabTransport(SlabTransport):
    """The slab protocol between GPUs, over a mailbox of the class `medium`."""

    medium: ClassVar[Callable[..., Mailbox]]

    def _make_mailbox(self, dispatch_bytes: int, combine_bytes: int) -> Mailbox:
        return type(self).medium(
            self.group,
            self.streams,
            num_lanes=self.num_lanes,
            dispatch_bytes=dispatch_bytes,
            combine_bytes=combine_bytes,
        )


def slab_bytes(shape: ExpertShape, world: World) -> int:
    """Host memory of all ranks for the slabs that go through it: a rank's tokens once, its sums for every rank."""
    if world.host_bytes is not None:
        return world.host_bytes
    row_bytes = RowFormat(shape).row_bytes + world.ranks * shape.hidden_size * shape.dtype.itemsize
    return world.ranks * world.num_lanes * world.max_tokens * row_bytes if world.ranks > 1 else 0
