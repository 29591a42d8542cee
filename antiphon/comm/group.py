"""One rank's end of a process group: collectives with a time limit, and errors that name the missing peer.

All ranks must issue the same collectives in the same order. With `record_order` the group fingerprints its own order,
and the agreement compares the fingerprints.
"""

from __future__ import annotations

import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from antiphon.comm.device_watch import DeviceWatch
from antiphon.comm.progress import ProgressBoard
from antiphon.core.errors import OptionError, PeerError, first_line
from antiphon.runtime import current_lane, num_lanes

_FIRST_NAP_S = 20e-6
_LONGEST_NAP_S = 1e-3


class Work(Protocol):
    """A collective in flight, on the CPU or on a device."""

    def wait(self) -> None: ...

    def ready_ns(self) -> int | None: ...


class Collectives(ABC):
    """Collectives among a set of ranks. Tensors must be contiguous, and outputs must not be read before the wait."""

    def all_gather(self, out: torch.Tensor, mine: torch.Tensor, label: str) -> Work:
        """Gather `mine` [n, ...] of every rank into `out` [W * n, ...], in rank order."""
        return self._queue(label, "all-gather", _all_gather, out, mine)

    def all_to_all(
        self, out: torch.Tensor, mine: torch.Tensor, label: str, *, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> Work:
        """Send `in_splits[r]` rows of `mine` to each rank r, and receive `out_splits[r]` rows from it into `out`."""
        return self._queue(label, "all-to-all", dist.all_to_all_single, out, mine, list(out_splits), list(in_splits))

    @abstractmethod
    def _queue(self, label: str, operation: str, call: Any, *arguments: Any) -> Work:
        """Start `call`. Its first two arguments are the output and the input."""


class Collective:
    """A collective in flight. It keeps its tensors alive until it has been waited for.

    queued: it runs on a device's stream, so the host does not see when its data arrives. limited: see
    `RankGroup.wait_for`.
    """

    __slots__ = ("_group", "_label", "_limited", "_ready_ns", "_tensors", "_work")

    def __init__(
        self,
        group: RankGroup,
        work: dist.Work,
        label: str,
        tensors: tuple[torch.Tensor, ...],
        *,
        queued: bool = False,
        limited: bool = True,
    ) -> None:
        self._group = group
        self._work = work
        self._label = label
        self._tensors = tensors
        self._limited = limited
        self._ready_ns: int | None = None
        if not queued:
            work.get_future().add_done_callback(self._note_ready)

    def _note_ready(self, _: object) -> None:
        self._ready_ns = time.perf_counter_ns()

    def wait(self) -> None:
        """Block until the data has arrived, or make the device's current stream wait for it.

        Raises `PeerError` after the group's time limit, or when a peer has ended.
        """
        self._group.wait_for(self._work, self._label, limited=self._limited)

    def ready_ns(self) -> int | None:
        """When this process saw that the data had arrived, or `None` if it did not see it."""
        return self._ready_ns


class Closeable(Protocol):
    """Something that is closed together with the group."""

    def close(self) -> None: ...


class RankGroup(Collectives):
    """One rank of a group of `size`. A group of one needs no process group, and nothing is sent.

    process_group: a gloo group of torch.distributed with the same ranks in the same order. The caller owns it and
        destroys it; `connect` makes one.
    timeout_s: maximum time to wait for a peer.
    board: where this rank records what it waits for.
    on_stuck: called on another thread with the report of a device wait that exceeded the limit, before the process
        ends.

    Not thread-safe: one host thread must issue all collectives.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        process_group: dist.ProcessGroup | None = None,
        timeout_s: float = 60.0,
        board: ProgressBoard | None = None,
        on_stuck: Callable[[str], None] | None = None,
    ) -> None:
        assert 0 <= rank < size
        assert size == 1 or process_group is not None
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self._process_group = process_group
        self._owns_process_group = False
        self._closed = False
        self._board = board
        self._order: list[str] | None = None
        self.extras: dict[Hashable, Closeable] = {}  # shared by the transports that use this group
        self._on_stuck = on_stuck
        self._device_watch: DeviceWatch | None = None

    @classmethod
    def connect(
        cls,
        *,
        rank: int,
        size: int,
        init_method: str,
        timeout_s: float = 60.0,
        meeting_timeout_s: float | None = None,
        board: ProgressBoard | None = None,
        on_stuck: Callable[[str], None] | None = None,
    ) -> RankGroup:
        """Connect to the other ranks over gloo; `init_method` as in `torch.distributed.init_process_group`.

        Works once per process, because torch cannot retry a rendezvous.
        Raises `OptionError` if the process already has a process group, and `PeerError` if not all ranks arrive within
        `meeting_timeout_s` (default: `timeout_s`).
        """
        if dist.is_initialized():
            raise OptionError(
                "torch.distributed is already initialized in this process",
                remedy="wrap a gloo group of it: RankGroup(rank=..., size=..., "
                "process_group=torch.distributed.new_group(backend='gloo'))",
                option="init_method",
                value=init_method,
            )
        meeting_timeout_s = timeout_s if meeting_timeout_s is None else meeting_timeout_s
        if board is not None:
            board.mark(rank, "waiting for its peers to connect")
        try:
            dist.init_process_group(
                "gloo",
                init_method=init_method,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=max(timeout_s, meeting_timeout_s)),
            )
        except (RuntimeError, dist.DistError) as error:
            raise _peer_error(f"rank {rank} could not connect to its peers", rank, board, error) from error
        group = cls(
            rank=rank,
            size=size,
            process_group=dist.group.WORLD,
            timeout_s=timeout_s,
            board=board,
            on_stuck=on_stuck,
        )
        group._owns_process_group = True
        return group

    def part(self, ranks: Sequence[int]) -> RankGroup:
        """Make the group of some of these ranks, in the given order. All of them must call it at the same time.

        `ranks` must include this rank. If they are all ranks, the result is this group itself. A new group numbers its
        ranks from 0 and has no progress board.
        """
        if tuple(ranks) == tuple(range(self.size)):
            return self
        mine = list(ranks).index(self.rank)
        if len(ranks) == 1:
            return RankGroup(rank=0, size=1, timeout_s=self.timeout_s)
        self._check_open()
        assert self._process_group is not None
        world = dist.get_process_group_ranks(self._process_group)
        process_group = dist.new_group(
            [world[rank] for rank in ranks],
            backend="gloo",
            timeout=timedelta(seconds=self.timeout_s),
            use_local_synchronization=True,
        )
        part = RankGroup(
            rank=mine,
            size=len(ranks),
            process_group=process_group,
            timeout_s=self.timeout_s,
            on_stuck=self._on_stuck,
        )
        part._owns_process_group = True
        return part

    def __repr__(self) -> str:
        return f"RankGroup(rank {self.rank} of {self.size})"

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The CPU group; `None` for a group of one."""
        return self._process_group

    def close(self) -> None:
        """Destroy the process group unless the caller owns it. Peers that still wait for this rank get an error."""
        self._closed = True
        for extra in self.extras.values():
            extra.close()
        self.extras.clear()
        if self._device_watch is not None:
            self._device_watch.close()
        if self._process_group is not None and self._owns_process_group:
            dist.destroy_process_group(self._process_group)
        self._process_group = None

    def device_watch(self) -> DeviceWatch:
        """The watch over this rank's device waits; created on first use."""
        if self._device_watch is None:
            self._device_watch = DeviceWatch(
                rank=self.rank, timeout_s=self.timeout_s, board=self._board, on_stuck=self._on_stuck
            )
        return self._device_watch

    # ---- collectives

    def all_gather_object(self, value: object) -> list[Any]:
        """Gather the `value` of every rank, by pickle. Slow; meant for setup and errors."""
        if self.size == 1:
            return [value]
        self._check_open()
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._process_group)
        except RuntimeError as error:
            what = f"rank {self.rank} could not exchange {type(value).__name__} with its peers"
            raise _peer_error(what, self.rank, self._board, error) from error
        return values

    def _queue(self, label: str, operation: str, call: Any, *arguments: Any) -> Collective:
        self._check_open()
        launch = partial(call, *arguments, group=self._process_group, async_op=True)
        return Collective(self, self.start(launch, label, operation), label, arguments[:2])

    def start(self, launch: Callable[[], Any], label: str, operation: str) -> Any:
        """Start a collective on any communicator of these ranks. Raises `PeerError` if it cannot start."""
        self.note(label, operation)
        try:
            return launch()
        except RuntimeError as error:
            raise _peer_error(f"rank {self.rank} could not start {label!r}", self.rank, self._board, error) from error

    def _check_open(self) -> None:
        if self._closed:  # torch takes group=None for the default group
            raise PeerError(f"rank {self.rank} has closed its group", remedy="make a new group")

    def wait_for(self, work: dist.Work, label: str, *, limited: bool = True) -> None:
        """Wait for a collective. Raises `PeerError` after the time limit.

        limited: whether the time limit applies. False for a wait on a device's stream, which does not block the host
            and which the backend limits.
        """
        where = located(label)
        self._mark(f"waiting for {where}")
        start = time.monotonic()
        try:
            work.wait(timedelta(seconds=self.timeout_s)) if limited else work.wait()
        except RuntimeError as error:
            waited_s = time.monotonic() - start
            how = "timed out" if waited_s > 0.99 * self.timeout_s else "failed"  # gloo notices when a peer ends
            what = f"rank {self.rank} {how} after {waited_s:.1f} s waiting for {where}"
            raise _peer_error(what, self.rank, self._board, error) from error
        self._mark(f"computing after {where}")

    def wait_until(self, done: Callable[[], bool], label: str, *, peer: int) -> None:
        """Block until `done()` returns true, which `peer` brings about. Raises `PeerError` after the time limit."""
        if done():
            return
        where = f"{located(label)} from rank {peer}"
        self._mark(f"waiting for {where}")
        start = time.monotonic()
        nap_s = 0.0
        while not done():
            waited_s = time.monotonic() - start
            if waited_s > self.timeout_s:
                what = f"rank {self.rank} timed out after {waited_s:.1f} s waiting for {where}"
                raise _peer_error(what, self.rank, self._board)
            time.sleep(nap_s)
            nap_s = min(nap_s + _FIRST_NAP_S, _LONGEST_NAP_S)
        self._mark(f"computing after {where}")

    def _mark(self, where: str) -> None:
        if self._board is not None:
            self._board.mark(self.rank, where)

    # ---- debug mode: comparing the order of collectives

    def record_order(self) -> None:
        """Start recording all collectives for `order_fingerprint`."""
        self._order = []

    def note(self, label: str, operation: str) -> None:
        """Record that a communication is about to start. Every transport calls it."""
        if self._order is not None:
            self._order.append(f"{located(label)}: {operation}")

    def order_fingerprint(self) -> int:
        """A checksum of the collectives since the last comparison; 0 if they are not recorded."""
        return 0 if self._order is None else zlib.crc32("\n".join(self._order).encode()) | 1 << 32

    def clear_order(self) -> None:
        """Forget the recorded collectives, which the ranks have compared."""
        if self._order is not None:
            self._order.clear()

    def first_order_difference(self) -> str:
        """Compare the recorded collectives of all ranks and describe the first difference. All ranks must call it."""
        orders = [order or [] for order in self.all_gather_object(self._order)]
        for number in range(max(map(len, orders))):
            names = [order[number] if number < len(order) else "nothing" for order in orders]
            if len(set(names)) > 1:
                calls = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(names))
                return f"collective {number} differs: {calls}"
        return "no difference"


def _all_gather(out: torch.Tensor, mine: torch.Tensor, **options: Any) -> Any:
    # torch 2.13 renamed the call and warns about the old name; 2.11 has only the old one.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(out, mine, **options)


def _peer_error(fact: str, rank: int, board: ProgressBoard | None, error: Exception | None = None) -> PeerError:
    """The error, with what the board knows about the peers and the library's own reason."""
    known = [] if board is None else [board.describe(except_rank=rank)]
    if error is not None:
        known.append(f"({_reason(error)})")
    return PeerError(fact, limit=" ".join(known))


def _reason(error: Exception) -> str:
    """The fact in gloo's message, without the source location and the advice."""
    return re.sub(r"^\[\S+\] ", "", first_line(error)).partition(" This is typically")[0].rstrip(".")


def located(label: str) -> str:
    """The label, with the running lane if there are several."""
    return f"{label}, lane {current_lane()}" if num_lanes() > 1 else label
