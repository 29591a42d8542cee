"""`local`: one rank holds all experts; nothing is sent."""

from __future__ import annotations

import torch

from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import Flight, Transport
from antiphon.machine.facts import Facts


class LocalTransport(Transport):
    """Rows are the tokens themselves, and partial sums are the whole sums."""

    name = "local"

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        if world.ranks == 1:
            return None
        return Refusal("for one rank", "ask for --ranks 1, or use auto", limit=f"there are {world.ranks}")

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        return Way("one rank holds all experts, nothing is sent")

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        # Copies, as with every other transport: the caller may reuse its tensors when the call has returned.
        rows = self.rows(x_TD.clone(), routes.ids_TK.clone(), routes.weights_TK.clone())
        return Flight(wait=lambda: rows, num_messages=0)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        out_TD = partial_RD.clone()
        return Flight(wait=lambda: out_TD, num_messages=0)
