"""The slab protocol: dense dispatch and combine over a mailbox, the same for every medium.

    dispatch   tokens packed into this rank's slab of its own box ──put──► the same place in every peer's box
    experts    read the whole box: one row for every token of every rank, in rank order
    combine    each peer's partial sums ──put──► this rank's slab in that peer's box; the owner adds in rank order

All tokens go to all ranks, so no counts have to be exchanged; with a top-k that is large compared to the number of
ranks, exact routing would save little (docs/facts.md). The length of a slab follows from its rank's number of tokens,
which the agreement knows. `mailbox` explains why no barrier is needed.

Shapes: `T` tokens of this rank, `D` hidden size, `R` tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Unpack

import torch

from antiphon.comm.needs import World
from antiphon.comm.row_format import RowFormat
from antiphon.comm.slab.mailbox import Arrival, Exchange, Mailbox, Phase, Put
from antiphon.comm.stepwise import StepwiseTransport
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import Flight, MadeFor
from antiphon.kernels.pack import add_in_rank_order, pack_rows

_KEPT_LAYOUTS = 64


@dataclass(slots=True, eq=False, kw_only=True)
class Layout:
    """Everything that follows from the token counts of one lane: views of its buffers, and what goes where.

    It is cached per set of counts, because making it takes the host longer than sending. It owns no memory that a
    captured step uses: boxes and sums live as long as the transport, and a capture copies the values of operations.
    """

    lane: int
    num_tokens: int  # of this rank
    packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, weights and ids in this rank's slab
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, ids and weights of all ranks
    box: torch.Tensor  # those rows as bytes
    partials_RD: torch.Tensor
    home: list[torch.Tensor]  # the sums [T, D] of this rank's tokens from every rank, in rank order
    dispatch: Exchange
    combine: Exchange


class SlabTransport(StepwiseTransport[Layout]):
    """Dispatch and combine over a mailbox of the class `medium`."""

    medium: ClassVar[Callable[..., Mailbox]]
    """Makes the mailbox, on all ranks at the same time. Its sizes are those of one lane's boxes."""

    def __init__(self, shape: ExpertShape, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, **made_for)
        self._format = RowFormat(shape)
        self._sum_bytes = shape.hidden_size * shape.dtype.itemsize
        rows = self.group.size * self.max_tokens
        self.mailbox = type(self).medium(
            self.group,
            self.streams,
            num_lanes=self.num_lanes,
            dispatch_bytes=rows * self._format.row_bytes,
            combine_bytes=rows * self._sum_bytes,
        )
        with torch.inference_mode(False):  # so that it can be used both inside and outside inference mode
            self.partial_sums = [
                torch.empty(rows, shape.hidden_size, dtype=shape.dtype, device=self.streams.device)
                for _ in range(self.num_lanes)
            ]
        self._layouts: list[dict[tuple[int, ...], Layout]] = [{} for _ in range(self.num_lanes)]

    def reset(self) -> None:
        super().reset()
        self.mailbox.reset_after_failure()

    def before_replay(self) -> None:
        self.mailbox.before_replay()

    def plan(self, lane: int, routes: Routes, tokens_by_rank: tuple[int, ...] | None) -> Layout:
        assert tokens_by_rank is not None
        layouts = self._layouts[lane]
        layout = layouts.pop(tokens_by_rank, None)
        if layout is None:
            if len(layouts) >= _KEPT_LAYOUTS:
                layouts.pop(next(iter(layouts)))  # the least recently used
            with torch.inference_mode(False):
                layout = self._make_layout(lane, tokens_by_rank)
        layouts[tokens_by_rank] = layout  # keeps the layouts in order of last use
        return layout

    def pack(self, exchange: Layout, x_TD: torch.Tensor, routes: Routes) -> None:
        pack_rows(*exchange.packed, x_TD, routes.weights_TK, routes.ids_TK)

    def send(self, exchange: Layout, label: str) -> Flight[None]:
        return self._send(exchange.dispatch, label)

    def rows_of(self, exchange: Layout) -> Rows:
        return self.rows(*exchange.rows, exchange.partials_RD)

    def partials_of(self, exchange: Layout) -> torch.Tensor:
        return exchange.partials_RD

    def send_back(self, exchange: Layout, label: str) -> Flight[None]:
        return self._send(exchange.combine, label)

    def add(self, exchange: Layout) -> torch.Tensor:
        return add_in_rank_order(exchange.home)

    def _make_layout(self, lane: int, tokens_by_rank: tuple[int, ...]) -> Layout:
        me, size, form = self.group.rank, self.group.size, self._format
        peers = [(me + step) % size for step in range(1, size)]
        starts = (0, *accumulate(tokens_by_rank))

        def part_of(rows: torch.Tensor, rank: int) -> torch.Tensor:
            return rows[starts[rank] : starts[rank + 1]]

        rows = self.mailbox.box(lane, Phase.DISPATCH)[: starts[-1] * form.row_bytes].view(-1, form.row_bytes)
        mine = part_of(rows, me)
        partials_RD = self.partial_sums[lane][: starts[-1]]
        my_bytes = tokens_by_rank[me] * self._sum_bytes
        home = self.mailbox.box(lane, Phase.COMBINE)[: size * my_bytes].view(self.shape.dtype)
        home_WTD = home.view(size, tokens_by_rank[me], self.shape.hidden_size)
        return Layout(
            lane=lane,
            num_tokens=tokens_by_rank[me],
            packed=(form.x(mine), form.weights(mine), form.ids(mine)),
            rows=(form.x(rows), form.ids(rows), form.weights(rows)),
            box=rows.view(-1),
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

    def _send(self, exchange: Exchange, label: str) -> Flight[None]:
        exchange.label = label
        self.group.note(label, "slabs")
        self.mailbox.put(exchange)
        self.mailbox.signal(exchange)

        def wait() -> None:
            self.mailbox.wait(exchange)
            self.mailbox.reset(exchange)

        return Flight(
            wait=wait,
            ready_ns=self.mailbox.ready_ns(exchange),
            num_bytes=exchange.num_bytes,
            num_messages=int(bool(exchange.puts)),
        )


def slab_bytes(shape: ExpertShape, world: World) -> int:
    """Bytes of host memory for the slabs of all ranks: each rank's tokens once, and its sums for every rank."""
    if world.host_bytes is not None:
        return world.host_bytes
    row_bytes = RowFormat(shape).row_bytes + world.ranks * shape.hidden_size * shape.dtype.itemsize
    return world.ranks * world.num_lanes * world.max_tokens * row_bytes if world.ranks > 1 else 0
