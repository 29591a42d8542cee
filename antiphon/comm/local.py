"""`local`: one rank holds all experts; nothing is sent."""

from __future__ import annotations

import torch

from antiphon.comm.transport import Flight, Routes, Rows, Transport

__all__ = ["LocalTransport"]


class LocalTransport(Transport):
    """Rows are the tokens themselves, and partial sums are the whole sums."""

    name = "local"

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        rows = Rows(x_TD, self.local_ids(routes.ids_TK), routes.weights_TK)
        return Flight(wait=lambda: rows, num_messages=0)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        return Flight(wait=partial_RD.clone, num_messages=0)
