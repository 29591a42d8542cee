"""`local`: a single rank holds all experts, so nothing is sent."""

from __future__ import annotations

import torch

from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import Flight, Transport
from antiphon.machine.facts import Facts


class LocalTransport(Transport):
    """The rows are the tokens themselves, and the partial sums are the final sums."""

    name = "local"
    capture_obstacle = ""

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
        rows = self.rows(x_TD.clone(), routes.ids_TK.clone(), routes.weights_TK.clone())
        return Flight(wait=lambda: rows, num_messages=0)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        out_TD = partial_RD.clone()
        return Flight(wait=lambda: out_TD, num_messages=0)
