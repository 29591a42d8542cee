"""Runs one part of a transport alone, to measure it: its computation or its communication.

    part_of(transport, TransportPart.COMPUTE_ONLY)

A part reuses the counts of the lane's last whole exchange and whatever is in the buffers, so its results are
meaningless. Run the same lanes over the whole transport first. Runs of different parts are not ordered against each
other: before you switch parts, synchronize the device and let all ranks meet.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from antiphon.comm import DataPath, Flight, Routes, Rows, Transport
from antiphon.comm.local import LocalTransport
from antiphon.comm.simulated import SimulatedTransport
from antiphon.comm.stepwise import StepwiseTransport
from antiphon.core.errors import OptionError


class TransportPart(Enum):
    """Which part of a transport runs."""

    WHOLE = "whole"
    COMPUTE_ONLY = "compute only"  # planning, packing and local sums; no copies over the link, no flags, no waits
    LINK_ONLY = "link only"  # copies over the link, flags and waits


def part_of(transport: Transport, part: TransportPart) -> Transport:
    """A transport that runs only this part of `transport`. Raises `OptionError` if it is not a `StepwiseTransport`."""
    if part is TransportPart.WHOLE or isinstance(transport, LocalTransport):
        return transport
    if isinstance(transport, SimulatedTransport):
        inner = part_of(transport.inner, part)
        return SimulatedTransport(inner, transport.link) if part is TransportPart.LINK_ONLY else inner
    if not isinstance(transport, StepwiseTransport):
        raise OptionError(
            f"transport {transport.name!r} cannot be measured in parts",
            limit="it is not a StepwiseTransport",
            remedy="measure allgather, alltoall or a slab transport",
            option="transport",
            value=transport.name,
        )
    return (_ComputeOnly if part is TransportPart.COMPUTE_ONLY else _LinkOnly)(transport)


class _Part(Transport):
    """A part of the transport `whole`. It tracks the phases of its own lanes, but uses the buffers of `whole`."""

    name = "part"

    def __init__(self, whole: StepwiseTransport[Any]) -> None:
        super().__init__(whole.shape, **whole.made_for)
        self.whole = whole
        self.num_sms = whole.num_sms

    @property
    def data_path(self) -> DataPath:
        return self.whole.data_path

    def _last(self, lane: int, num_tokens: int) -> Any:
        """The lane's last whole exchange, whose counts are reused."""
        exchange = self.whole.exchanges[lane]
        if exchange is None or exchange.num_tokens != num_tokens:
            before = "none" if exchange is None else f"{exchange.num_tokens} tokens"
            raise OptionError(
                f"a part of {self.whole.name!r} cannot run on lane {lane} with {num_tokens} tokens",
                limit=f"its last whole exchange had {before}",
                remedy="run the same tokens over the whole transport first",
            )
        return exchange


class _ComputeOnly(_Part):
    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        exchange = self._last(lane, x_TD.shape[0])
        if tokens_by_rank is None and self.whole.wants_counts:
            raise OptionError("a part cannot exchange counts", remedy="pass tokens_by_rank", option="tokens_by_rank")
        self.whole.pack(self.whole.plan(lane, routes, tokens_by_rank), x_TD, routes)
        return Flight(wait=lambda: self.whole.rows_of(exchange))

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        exchange = self.whole.exchanges[lane]
        self.whole.keep(exchange, partial_RD)
        return Flight(wait=lambda: self.whole.add(exchange))


class _LinkOnly(_Part):
    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        exchange = self._last(lane, x_TD.shape[0])
        return self.whole.send(exchange, label).then(lambda _: self.whole.rows_of(exchange))

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        exchange: Any = self.whole.exchanges[lane]
        out_TD = torch.empty(
            exchange.num_tokens, self.shape.hidden_size, dtype=self.shape.dtype, device=partial_RD.device
        )
        return self.whole.send_back(exchange, label).then(lambda _: out_TD)
