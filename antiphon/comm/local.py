"""`local`: a single rank holds all experts, so nothing is sent."""

from __future__ import annotations

from typing import Unpack

import torch

from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import RowFormat
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import Flight, MadeFor, Transport
from antiphon.machine.facts import Facts


class LocalTransport(Transport):
    """The rows are copies of the tokens, and the partial sums are the final sums."""

    name = "local"
    capture_obstacle = ""

    def __init__(self, shape: ExpertShape, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, **made_for)
        self._format = RowFormat(shape)
        self._sums: list[torch.Tensor | None] = [None] * self.num_lanes  # of the last dispatch

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        if world.ranks == 1:
            return None
        return Refusal("serves a single rank", "use --ranks 1, or transport auto", limit=f"there are {world.ranks}")

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        return Way("one rank holds all experts, so nothing is sent")

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        # Copied, as by every other transport, so that the caller may reuse its tensors once the call has returned.
        packed, form = x_TD.new_empty(x_TD.shape[0], self._format.row_bytes, dtype=torch.uint8), self._format
        form.pack(packed, x_TD, routes)
        out_TD = self._sums[lane] = torch.empty_like(x_TD)
        rows = self.rows(form.x(packed), form.ids(packed), form.weights(packed), out_TD)
        return Flight(wait=lambda: rows, num_messages=0)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        out_TD, self._sums[lane] = self._sums[lane], None
        if out_TD is None or out_TD.data_ptr() != partial_RD.data_ptr():
            out_TD = partial_RD.clone()
        result = out_TD
        return Flight(wait=lambda: result, num_messages=0)
