"""The mailbox: four calls under the slab transports, and what one exchange is.

    put     copy my slabs to where my peers find them        on a comm stream, after the compute so far
    signal  tell every peer that its slab is complete        behind the puts
    wait    until every peer's slab is here                  on the compute stream; the host does not wait on a GPU
    reset   take every peer's signal down again              behind the wait

A medium implements them over peer copies, pinned host memory or shared memory. Every rank has a box for each lane and
phase, in which its peers' slabs land; a flag for each lane, phase and peer says that one is complete.

Why no barrier is needed. Let a and b be any two ranks, on one lane. Every rank signals every peer in both phases, with
nothing to send too; `wait` waits for all peers; dispatch n, combine n, dispatch n+1 ... alternate.

- b's dispatch box. a puts dispatch n+1 there after it has waited for b's combine n. b signalled that after its experts
  had read dispatch n, from every peer, not only from a. So nobody's slab n is overwritten before it was read, though
  the offsets of the slabs change with the numbers of tokens.
- b's combine box. a puts combine n+1 after it has waited for b's dispatch n+1, which b sent after it had added up
  combine n.
- a's own sources. a packs dispatch n+1, and its experts write the sums of combine n+1, into memory from which the last
  put of the same phase has been read: b signals the phase in between after it has waited for that put.
- Flags. b's flag for a is 1 only between a's signal and b's reset. a signals dispatch n+1 after it has waited for b's
  combine n, which b signalled behind its reset of dispatch n; the same with the phases exchanged. So a flag never
  needs more than 0 and 1, and what a captured graph writes and waits for are constants.

"After" is program order on the host, the order of a stream, an event between two streams, or a flag. A medium must
keep: puts before their signal, as seen by whoever waits for the signal; a wait before what follows it on the compute
stream; `wait` before `reset`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch

from antiphon.runtime import Event


class Phase(IntEnum):
    """The two phases of an MoE layer, which alternate on every lane."""

    DISPATCH = 0
    COMBINE = 1


@dataclass(frozen=True, slots=True)
class Put:
    """A slab of mine for a peer: contiguous, and mine until the opposite phase has been waited for."""

    peer: int
    source: torch.Tensor  # uint8 [num_bytes]
    offset: int  # bytes, in the peer's box


@dataclass(frozen=True, slots=True)
class Arrival:
    """A peer's slab for me."""

    peer: int
    offset: int  # bytes, in my box
    num_bytes: int


@dataclass(slots=True, kw_only=True, eq=False)
class Exchange:
    """One phase on one lane, as one rank sees it. Puts and arrivals are in the same order of peers on every call.

    Used again for every layer with the same numbers of tokens; only the label changes.
    """

    lane: int
    phase: Phase
    puts: tuple[Put, ...]
    arrivals: tuple[Arrival, ...]
    same_source: bool  # every peer gets the same slab at the same offset
    label: str = ""  # for recordings and errors: "dispatch layer 3"
    num_bytes: int = field(init=False)  # to or from the peers, whichever is more
    prepared: Any = None  # what the medium has prepared for repeated use

    def __post_init__(self) -> None:
        sent = sum(put.source.numel() for put in self.puts)
        self.num_bytes = max(sent, sum(arrival.num_bytes for arrival in self.arrivals))


class Mailbox(ABC):
    """One rank's end. Ranks make theirs together, and call put, signal, wait, reset once each for every exchange."""

    @abstractmethod
    def box(self, lane: int, phase: Phase) -> torch.Tensor:
        """My box: uint8 [box_bytes], on the device. Between the slabs of the peers it is mine to use."""

    @abstractmethod
    def put(self, exchange: Exchange) -> None:
        """Start my copies."""

    @abstractmethod
    def signal(self, exchange: Exchange) -> None:
        """Set my flags at the peers."""

    @abstractmethod
    def wait(self, exchange: Exchange) -> None:
        """Wait for the slabs; on the CPU it blocks. Raises `PeerError` after the group's time limit."""

    def reset(self, exchange: Exchange) -> None:  # noqa: B027 (an answer, not a gap)
        """Clear the flags; nothing to do where a stream's wait for a flag also clears it."""

    def ready_ns(self, exchange: Exchange) -> Callable[[], int | None] | None:
        """When the last slab of the exchange was there, for `Pending.ready_ns`; `None` if the medium cannot tell."""
        return None

    @abstractmethod
    def describe(self, names: MemoryNames) -> None:
        """Say what lies at which address: boxes, flags, and what else slabs pass through."""


class MemoryNames(Protocol):
    """Takes the names of memories and flags; of two names for the same address the first one holds."""

    def name_memory(self, address: int, num_bytes: int, name: str) -> None: ...

    def name_box(self, address: int, num_bytes: int, owner: int, lane: int, phase: Phase) -> None: ...

    def name_flag(self, address: int, reader: int, lane: int, phase: Phase, source: int, chunk: int = 0) -> None:
        """The flag at `reader` that `source` sets."""
        ...


class CommStreams(Protocol):
    """What the media of CUDA devices use of `CudaStreams`."""

    @property
    def compute_handle(self) -> int: ...

    def record(self) -> Event: ...

    def wait(self, event: Event) -> None: ...

    def queue_on(self, name: str, *, after: Event | None = None) -> int: ...

    def record_on(self, name: str) -> Event: ...
