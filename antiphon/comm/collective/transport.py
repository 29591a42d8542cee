"""What the transports over collectives share: buffers of rows and sums per lane, and the backend that moves them.

The backend is gloo between CPUs, and torch's backend for the device where devices queue their work (`queued`).
"""

from __future__ import annotations

from typing import Unpack

import torch

from antiphon.comm import needs
from antiphon.comm.collective.queued import QueuedGroup
from antiphon.comm.group import Collectives
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import LaneBuffers, RowFormat
from antiphon.comm.stepwise import ExchangeT, StepwiseTransport
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import MadeFor
from antiphon.machine.facts import Facts


class CollectiveTransport(StepwiseTransport[ExchangeT]):
    """A stepwise transport over the collectives of one backend. max_ctas: see `QueuedGroup.of`."""

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        return needs.collectives(facts, world)

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        return needs.collectives_way(facts, world)

    def __init__(self, shape: ExpertShape, *, max_ctas: int | None = None, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, **made_for)
        self.num_sms = max_ctas or 0
        self._format = RowFormat(shape)
        self._sum_bytes = shape.hidden_size * shape.dtype.itemsize
        self._buffers = [LaneBuffers(self.streams.device) for _ in range(self.num_lanes)]
        self._link = self._connect(max_ctas)

    def _connect(self, max_ctas: int | None) -> Collectives:
        """Make the communicator that the steps use."""
        if not self.streams.owner.queues:
            return self.group
        return QueuedGroup.of(self.group, self.streams, max_ctas=max_ctas)

    def _rows(self, name: str, lane: int, num_rows: int) -> torch.Tensor:
        """Packed rows [num_rows, row_bytes]."""
        return self._buffers[lane].get(name, num_rows, self._format.row_bytes, torch.uint8)

    def _sums(self, name: str, lane: int, num_rows: int) -> torch.Tensor:
        """Partial sums [num_rows, D]."""
        return self._buffers[lane].get(name, num_rows, self.shape.hidden_size, self.shape.dtype)
