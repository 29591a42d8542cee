"""Transports whose phases consist of steps, each either computation or communication.

    dispatch   plan, pack ──send──► rows
    combine    keep ──send_back──► add

`plan`, `pack`, `keep` and `add` are computation; `send` and `send_back`, with their waits, are communication. The steps
are called in this order. A benchmark may also run the steps of one kind alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, Protocol, TypeVar, Unpack

import torch

from antiphon.comm.group import RankGroup, Work
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import Flight, MadeFor, Transport
from antiphon.core.errors import LaneError
from antiphon.runtime import Pending


class Planned(Protocol):
    """What every exchange has: its lane, and this rank's number of tokens."""

    @property
    def lane(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


ExchangeT = TypeVar("ExchangeT", bound=Planned)


class StepwiseTransport(Transport, Generic[ExchangeT]):
    """Implementations fill in the steps. An `ExchangeT` holds what they know about a dispatch and its combine."""

    wants_counts = True  # whether `plan` must know how many tokens every rank sends

    def __init__(self, shape: ExpertShape, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, **made_for)
        self.exchanges: list[ExchangeT | None] = [None] * self.num_lanes  # the latest of each lane

    # ---- the steps

    @abstractmethod
    def plan(self, lane: int, routes: Routes, tokens_by_rank: tuple[int, ...] | None) -> ExchangeT:
        """Decide what goes where. tokens_by_rank: `None` only if `wants_counts` is false."""

    @abstractmethod
    def pack(self, exchange: ExchangeT, x_TD: torch.Tensor, routes: Routes) -> None:
        """Write tokens and routes into the send buffer."""

    @abstractmethod
    def send(self, exchange: ExchangeT, label: str) -> Flight[None]:
        """Start sending what was packed."""

    @abstractmethod
    def rows_of(self, exchange: ExchangeT) -> Rows:
        """The rows that have arrived."""

    @abstractmethod
    def partials_of(self, exchange: ExchangeT) -> torch.Tensor:
        """The transport's own memory for the partial sums of these rows [R, D]."""

    def keep(self, exchange: ExchangeT, partial_RD: torch.Tensor) -> None:
        """Copy the caller's sums into the transport's memory, unless they are there already (see `Rows.out_RD`)."""
        own_RD = self.partials_of(exchange)
        if partial_RD.data_ptr() != own_RD.data_ptr():
            own_RD.copy_(partial_RD)

    @abstractmethod
    def send_back(self, exchange: ExchangeT, label: str) -> Flight[None]:
        """Start sending back the sums that were kept."""

    @abstractmethod
    def add(self, exchange: ExchangeT) -> torch.Tensor:
        """Add the sums that came back into a new tensor [T, D]."""

    # ---- the phases

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        if tokens_by_rank is None and self.wants_counts:
            tokens_by_rank = exchange_counts(self.group, x_TD.shape[0], lane=lane, label=label)
        exchange = self.exchanges[lane] = self.plan(lane, routes, tokens_by_rank)
        self.pack(exchange, x_TD, routes)
        return self.send(exchange, label).then(lambda _: self.rows_of(exchange))

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        exchange = self.exchanges[lane]
        assert exchange is not None
        self.keep(exchange, partial_RD)
        return self.send_back(exchange, label).then(lambda _: self.add(exchange))


def exchange_counts(group: RankGroup, num_tokens: int, *, lane: int, label: str) -> tuple[int, ...]:
    """Exchange the token counts of all ranks for a caller that does not know them. The host waits.

    Raises `LaneError` if a rank is on another lane: counts are matched by their order across all lanes.
    """
    found_W2 = torch.empty(group.size, 2, dtype=torch.int64, device="cpu")
    label = f"counts of {label}"
    work = group.all_gather(found_W2, torch.tensor([[num_tokens, lane]], device="cpu"), label)
    return tuple(arrived_counts(work, found_W2, lane, label))


def arrived_counts(work: Work, found_W2: torch.Tensor, lane: int, label: str) -> list[int]:
    """Wait inside a dispatch for every rank's (count, lane), and return the counts.

    Raises `LaneError` if a rank is on another lane.
    """
    # A pending, so that the wait is recorded as exposed communication. Its messages are counted with those of the rows.
    Pending(work.wait, label=label, ready_ns=work.ready_ns, num_messages=0).wait()
    counts: list[int] = found_W2[:, 0].tolist()
    for rank, other in enumerate(found_W2[:, 1].tolist()):
        if other != lane:
            raise LaneError(
                f"{label} on lane {lane} met rank {rank} on lane {other}",
                limit="all ranks must call dispatch and combine in the same order over all lanes",
                remedy="let the lanes switch alike on all ranks",
            )
    return counts


def flight_of(work: Work | None, *, num_bytes: int, num_messages: int = 1) -> Flight[None]:
    """The flight of a collective, or of nothing if `work` is `None`."""
    if work is None:
        return Flight(wait=lambda: None, num_bytes=num_bytes, num_messages=num_messages)
    return Flight(wait=work.wait, ready_ns=work.ready_ns, num_bytes=num_bytes, num_messages=num_messages)
