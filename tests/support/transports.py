"""Transports that break on purpose; workers load them by `tests.support.transports:Name`."""

from __future__ import annotations

import os
import time

import torch
from greenlet import getcurrent

from antiphon.comm import Flight, Routes, Rows
from antiphon.comm.alltoall import AllToAllTransport


class NoGreenlets(AllToAllTransport):
    """Fails in a lane that is a greenlet of its own."""

    name = "no-greenlets"

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        if getcurrent().parent is not None:
            raise ValueError(f"a greenlet reached {label} on lane {lane}")
        return super().send_tokens(lane, x_TD, routes, tokens_by_rank, label)


class StopsInCombine(AllToAllTransport):
    """Rank 1 sleeps for ever in its third combine."""

    name = "stops-in-combine"
    num_combines = 0

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        self.num_combines += 1
        if self.group.rank == 1 and self.num_combines == 3:
            time.sleep(1e6)
        return super().send_partials(lane, partial_RD, label)


class DiesInCombine(AllToAllTransport):
    """Rank 1 ends without a word in its third combine."""

    name = "dies-in-combine"
    num_combines = 0

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        self.num_combines += 1
        if self.group.rank == 1 and self.num_combines == 3:
            os._exit(7)
        return super().send_partials(lane, partial_RD, label)
