"""The mailbox: the four calls underneath the slab transports, and the description of one exchange.

    put     copy this rank's slabs to where its peers read them    comm stream, after the compute queued so far
    signal  tell every peer that its slab is complete              comm stream, after the puts
    wait    wait until every peer's slab has arrived               compute stream; on a GPU the host does not block
    reset   clear the flags of the peers                           compute stream, after the wait

A medium implements them over peer copies, pinned host memory or shared memory. Each rank has a box per lane and phase,
in which its peers' slabs land, and a flag per lane, phase and peer, which says that a slab is complete.

Why no barrier is needed: let a and b be any two ranks, on one lane. Every rank signals every peer in both phases, even
with nothing to send. `wait` waits for all peers. Phases alternate: dispatch n, combine n, dispatch n+1, and so on.

- b's dispatch box: a puts dispatch n+1 there after waiting for b's combine n. b signaled that combine after its experts
  had read dispatch n from every peer, not only from a. So no rank's slab n is overwritten before it has been read, even
  though the offsets of the slabs change with the numbers of tokens.
- b's combine box: a puts combine n+1 there after waiting for b's dispatch n+1, which b sent after adding up combine n.
- a's source memory: a packs dispatch n+1, and its experts write the sums of combine n+1, into memory that the previous
  put of the same phase has finished reading, because b signals the phase in between only after waiting for that put.
- Flags: b's flag for a is 1 only between a's signal and b's reset. a signals dispatch n+1 after waiting for b's
  combine n, which b signaled after its reset of dispatch n. The same holds with the phases swapped. So the values 0 and
  1 suffice, and a captured graph writes and waits for constants.

"After" means program order on the host, the order of a stream, an event between two streams, or a flag. A medium must
guarantee that whoever waits for a signal sees the puts before it, that work queued on the compute stream after a wait
runs after it, and that `reset` comes after `wait`.
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
    """A slab that this rank sends to a peer. It is contiguous, and reserved until the wait of the next phase."""

    peer: int
    source: torch.Tensor  # uint8 [num_bytes]
    offset: int  # in bytes, in the peer's box


@dataclass(frozen=True, slots=True)
class Arrival:
    """A slab that this rank receives from a peer."""

    peer: int
    offset: int  # in bytes, in this rank's box
    num_bytes: int


@dataclass(slots=True, kw_only=True, eq=False)
class Exchange:
    """One phase on one lane, as one rank sees it.

    It is reused for every layer with the same numbers of tokens; only the label changes. Puts and arrivals name the
    peers in the same order.
    """

    lane: int
    phase: Phase
    puts: tuple[Put, ...]
    arrivals: tuple[Arrival, ...]
    same_source: bool  # every peer gets the same slab at the same offset
    label: str = ""  # for recordings and errors: "dispatch layer 3"
    num_bytes: int = field(init=False)  # sent to the peers or received from them, whichever is more
    slab_bytes: int = field(init=False)  # of each slab, if all that are sent and received are equal, else 0
    prepared: Any = None  # owned by the medium: its preparations for repeated use

    def __post_init__(self) -> None:
        sent = [put.source.numel() for put in self.puts]
        received = [arrival.num_bytes for arrival in self.arrivals]
        self.num_bytes = max(sum(sent), sum(received))
        sizes = {*sent, *received}
        self.slab_bytes = sizes.pop() if len(sizes) == 1 else 0


class Mailbox(ABC):
    """One rank's end. All ranks make theirs together, then call put, signal, wait and reset once for each exchange."""

    @abstractmethod
    def box(self, lane: int, phase: Phase) -> torch.Tensor:
        """This rank's box, uint8 [box_bytes] on the device. The rank may write where no peer's slab lands."""

    @abstractmethod
    def put(self, exchange: Exchange) -> None:
        """Start copying this rank's slabs."""

    @abstractmethod
    def signal(self, exchange: Exchange) -> None:
        """Set this rank's flags at the peers."""

    @abstractmethod
    def wait(self, exchange: Exchange) -> None:
        """Wait for the peers' slabs. On the CPU it blocks and raises `PeerError` after the group's time limit."""

    def reset(self, exchange: Exchange) -> None:  # noqa: B027 (a default, not a gap)
        """Clear the flags. By default nothing happens: on a GPU, the stream clears each flag after waiting for it."""

    def ready_ns(self, exchange: Exchange) -> Callable[[], int | None] | None:
        """A function that gives the last slab's time of arrival, as in `Pending`; `None` if the medium cannot tell."""
        return None

    def reset_after_failure(self) -> None:  # noqa: B027 (a default, not a gap)
        """Forget exchanges that a failed run, such as a capture, has begun; see `Transport.reset`."""

    def before_replay(self) -> None:  # noqa: B027 (a default, not a gap)
        """See `Transport.before_replay`. By default nothing happens: on the CPU, the host limits its waits."""

    @abstractmethod
    def describe(self, names: MemoryNames) -> None:
        """Report the addresses of boxes, flags, and any other memory that slabs pass through."""


class MemoryNames(Protocol):
    """Collects the names of memory and flags. The first name for an address wins."""

    def name_memory(self, address: int, num_bytes: int, name: str) -> None: ...

    def name_box(self, address: int, num_bytes: int, owner: int, lane: int, phase: Phase) -> None: ...

    def name_flag(self, address: int, reader: int, lane: int, phase: Phase, source: int, chunk: int = 0) -> None:
        """The flag at `reader` that `source` sets."""
        ...


class CommStreams(Protocol):
    """The part of `CudaStreams` that the media of CUDA devices use."""

    @property
    def compute_handle(self) -> int: ...

    @property
    def capturing(self) -> bool: ...

    def record(self) -> Event: ...

    def wait(self, event: Event) -> None: ...

    def queue_on(self, name: str, *, after: Event | None = None) -> int: ...

    def record_on(self, name: str) -> Event: ...
