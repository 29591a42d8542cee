"""A log of everything that one rank queues for the slab protocol. `tests.support.happens_before` checks it for races.

    log = record(transport)          # on every rank, before its first exchange
    ...                              # any number of layers
    problems = check([log.events for every rank])

An event says which stream of which rank does what to which bytes, flag or stream event. The list is in the order in
which the host queued the events. The checker derives the order in which they run, from streams, stream events and
flags. On the CPU there is one stream, "host". Names are looked up from the addresses that the copies and flags were
given, so that a wrong address is noticed.

`record` puts wrappers around the mailbox, its memory and its streams.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch

from antiphon.comm.slab.mailbox import CommStreams, Exchange, Mailbox, MemoryNames, Phase
from antiphon.comm.slab.shared_memory import FlaggedMemory, SharedMemoryMailbox, Words, flag_address
from antiphon.comm.slab.transport import Layout, SlabTransport
from antiphon.device.cuda_stream_memory import MemoryStep, Replay, StreamMemory, StreamOperations
from antiphon.runtime import CudaStreams, Event

NAMELESS = "memory without a name"
"""The prefix of the place of an access to memory that has no name."""

_HOST = "host"
_COMPUTE = "compute"


class Action(Enum):
    """What an event does to its place."""

    READ = "reads"
    WRITE = "writes"
    SET = "sets"
    WAIT = "waits for"
    CLEAR = "clears"
    RECORD = "records"
    AWAIT = "awaits"


class LoggedEvent(NamedTuple):
    """One operation of one stream. Lane, phase and round are -1 for stream events, which belong to no exchange."""

    rank: int
    stream: str
    action: Action
    place: str  # the name of a memory, of a flag, or of an event of one of this rank's streams
    start: int  # range of bytes in the memory; 0 to 0 for flags and stream events
    stop: int
    operation: str  # "pack", "put", "signal", ...
    lane: int
    phase: int
    round: int  # counted per lane; a dispatch and its combine share one
    label: str


def record(transport: SlabTransport) -> MailboxLog:
    """Log everything that `transport` queues. All ranks call it before their first exchange."""
    from tests.support.kernel_log import log_kernels  # which stands on this module

    log, mailbox, rank = MailboxLog(transport.group.rank), transport.mailbox, transport.group.rank
    mailbox.describe(log)
    for lane, sums in enumerate(transport.partial_sums):
        log.name_memory(sums.data_ptr(), sums.nbytes, f"partial sums of rank {rank}, lane {lane}")
    if isinstance(mailbox, SharedMemoryMailbox):
        mailbox.memory = _LoggedFlags(log)
    else:
        assert isinstance(mailbox, _StreamMailbox)
        mailbox.streams = log.follow(mailbox.streams)
        mailbox.memory = _LoggedStreamMemory(mailbox.memory, log)
        log_kernels(mailbox, log, rank)
    transport.mailbox = LoggedMailbox(mailbox, transport, log)
    return log


class MailboxLog:
    """The log of one rank. Not thread-safe: one host thread must queue everything."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.events: list[LoggedEvent] = []
        self._memories: dict[int, tuple[int, str]] = {}  # by address: bytes, name
        self._starts: list[int] = []
        self._flags: dict[int, str] = {}
        self._streams: dict[int | None, str] = {None: _HOST}
        self.rounds: dict[int, int] = {}  # by lane
        self.exchange: Exchange | None = None  # the one that the mailbox is working on

    # ---- names, which must be known before anything is logged

    def name_memory(self, address: int, num_bytes: int, name: str) -> None:
        self._memories.setdefault(address, (num_bytes, name))
        self._starts = sorted(self._memories)

    def name_box(self, address: int, num_bytes: int, owner: int, lane: int, phase: Phase) -> None:
        self.name_memory(address, num_bytes, f"{phase.name.lower()} box of rank {owner}, lane {lane}")

    def name_flag(self, address: int, reader: int, lane: int, phase: Phase, source: int, chunk: int = 0) -> None:
        name = f"{phase.name.lower()} flag {chunk} from rank {source} at rank {reader}, lane {lane}"
        self._flags.setdefault(address, name)

    def follow(self, streams: CommStreams) -> CommStreams:
        """Wrap the streams so that their events are logged. Operations without a stream run on the compute stream."""
        self._streams[None] = self._streams[streams.compute_handle] = _COMPUTE
        return _LoggedStreams(streams, self, self._streams)

    def name_programs(self, names: dict[int, str]) -> None:
        """Log the programs of kernels like streams of these numbers."""
        self._streams.update(names)

    # ---- what the transport and its caller do around the mailbox, on the compute stream

    def packed(self, exchange: Exchange, slab: torch.Tensor) -> None:
        """A dispatch begins: this rank has written its slab."""
        self.rounds[exchange.lane] = self.rounds.get(exchange.lane, 0) + 1
        self._tensor(Action.WRITE, slab, "pack", exchange)

    def experts(self, lane: int, rows: torch.Tensor, partials: torch.Tensor, label: str) -> None:
        """Log that the experts read the box and write partial sums."""
        self._tensor(Action.READ, rows, "experts", _Part(lane, Phase.DISPATCH, label))
        self._tensor(Action.WRITE, partials, "experts", _Part(lane, Phase.COMBINE, label))

    def summed(self, exchange: Exchange, parts: Iterable[torch.Tensor]) -> None:
        for part in parts:
            self._tensor(Action.READ, part, "local sum", exchange)

    # ---- what a medium does; `stream` is the raw handle, or `None` on the CPU

    def stream_name(self, stream: int) -> str:
        return self._streams[stream]

    def copied(
        self, exchange: Exchange, operation: str, target: int, source: int, num_bytes: int, stream: int | None = None
    ) -> None:
        self._bytes(Action.READ, source, num_bytes, operation, exchange, stream)
        self._bytes(Action.WRITE, target, num_bytes, operation, exchange, stream)

    def flag(self, action: Action, exchange: Exchange, operation: str, address: int, stream: int | None = None) -> None:
        """Log that a flag is set, waited for or cleared. Words that are no flags, such as the watch's, are left out."""
        if (name := self._flags.get(address)) is not None:
            self._add(action, name, 0, 0, operation, exchange, stream)

    def stepped(self, exchange: Exchange, operation: str, steps: Iterable[MemoryStep], stream: int) -> None:
        """Log a batch of stream memory operations, in order."""
        for step in steps:
            action = Action.WAIT if step.waits else Action.SET if step.value else Action.CLEAR
            self.flag(action, exchange, operation, step.address, stream)

    def passed(self, action: Action, event: str, stream: str) -> None:
        """Log that a stream event is recorded or awaited."""
        self.events.append(LoggedEvent(self.rank, stream, action, event, 0, 0, "event", -1, -1, -1, ""))

    # ----

    def _tensor(self, action: Action, tensor: torch.Tensor, operation: str, part: Exchange | _Part) -> None:
        self._bytes(action, tensor.data_ptr(), tensor.numel() * tensor.element_size(), operation, part, None)

    def _bytes(
        self,
        action: Action,
        address: int,
        num_bytes: int,
        operation: str,
        part: Exchange | _Part,
        stream: int | None,
    ) -> None:
        """Log one event per named memory that the bytes lie in. The checker reports bytes that lie in none."""
        while num_bytes > 0:
            number = bisect_right(self._starts, address) - 1
            start = self._starts[number] if number >= 0 else 0
            size, name = self._memories.get(start, (0, ""))
            if not start <= address < start + size:
                following = self._starts[number + 1] if number + 1 < len(self._starts) else address + num_bytes
                start, size, name = address, following - address, f"{NAMELESS}, {address:#x}"
            taken = min(num_bytes, start + size - address)
            self._add(action, name, address - start, address - start + taken, operation, part, stream)
            address, num_bytes = address + taken, num_bytes - taken

    def _add(
        self,
        action: Action,
        place: str,
        start: int,
        stop: int,
        operation: str,
        part: Exchange | _Part,
        stream: int | None,
    ) -> None:
        lane, phase, label, number = part.lane, int(part.phase), part.label, self.rounds.get(part.lane, 0)
        self.events.append(
            LoggedEvent(
                self.rank, self._streams[stream], action, place, start, stop, operation, lane, phase, number, label
            )
        )


class _Part(NamedTuple):
    """Stands in for an exchange that has not begun or is over."""

    lane: int
    phase: Phase
    label: str


class LoggedMailbox(Mailbox):
    """Forwards to `inner`, and logs each call with what `transport` does around it.

    Experts may read the box and write partial sums at any time between dispatch and combine, so both are logged at the
    earliest and at the latest possible moment.
    """

    def __init__(self, inner: Mailbox, transport: SlabTransport, log: MailboxLog) -> None:
        self.inner = inner
        self._transport = transport
        self._log = log

    def box(self, lane: int, phase: Phase) -> torch.Tensor:
        return self.inner.box(lane, phase)

    def put(self, exchange: Exchange) -> None:
        self._log.exchange = exchange
        if exchange.phase is Phase.DISPATCH:
            self._log.packed(exchange, exchange.puts[0].source)
        else:
            self._log_experts(exchange)
        self.inner.put(exchange)

    def signal(self, exchange: Exchange) -> None:
        self._log.exchange = exchange
        self.inner.signal(exchange)

    def wait(self, exchange: Exchange) -> None:
        self._log.exchange = exchange
        self.inner.wait(exchange)

    def reset(self, exchange: Exchange) -> None:
        self._log.exchange = exchange
        self.inner.reset(exchange)
        if exchange.phase is Phase.DISPATCH:
            self._log_experts(exchange)
        else:
            self._log.summed(exchange, self._layout(exchange).home)

    def before_replay(self) -> None:
        self.inner.before_replay()

    def ready_ns(self, exchange: Exchange) -> Callable[[], int | None] | None:
        return self.inner.ready_ns(exchange)

    def describe(self, names: MemoryNames) -> None:
        self.inner.describe(names)

    def _layout(self, exchange: Exchange) -> Layout:
        layout = self._transport.exchanges[exchange.lane]
        assert layout is not None
        return layout

    def _log_experts(self, exchange: Exchange) -> None:
        layout = self._layout(exchange)
        self._log.experts(exchange.lane, layout.box, layout.partials_RD, exchange.label)


class _LoggedFlags(FlaggedMemory):
    """Logs what a CPU does to shared memory."""

    def __init__(self, log: MailboxLog) -> None:
        self._log = log

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        super().copy(target, source)
        self._log.copied(self._exchange, "put", target.data_ptr(), source.data_ptr(), target.numel())

    def set_flag(self, words: Words, number: int) -> None:
        super().set_flag(words, number)
        self._log.flag(Action.SET, self._exchange, "signal", flag_address(words, number))

    def arrival_ns(self, words: Words, number: int) -> int:
        self._log.flag(Action.WAIT, self._exchange, "wait", flag_address(words, number))
        return super().arrival_ns(words, number)

    def clear_flag(self, words: Words, number: int) -> None:
        super().clear_flag(words, number)
        self._log.flag(Action.CLEAR, self._exchange, "reset", flag_address(words, number))

    @property
    def _exchange(self) -> Exchange:
        assert self._log.exchange is not None
        return self._log.exchange


@runtime_checkable
class _StreamMailbox(Protocol):
    """What the mailboxes of devices have in addition to `Mailbox`."""

    streams: CommStreams
    memory: StreamMemory


_COPIES = {"up": "upload", "down": "download"}
"""The operation that a copy on a stream is; on other streams it is a put."""


class _LoggedStreamMemory(StreamMemory):
    """Logs what a device's streams do. Replays are queued call by call instead of captured, so that each is logged."""

    def __init__(self, inner: StreamMemory, log: MailboxLog) -> None:
        self._inner = inner
        self._log = log

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self._inner.copy(target, source, num_bytes, stream)
        operation = _COPIES.get(self._log.stream_name(stream), "put")
        assert self._log.exchange is not None
        self._log.copied(self._log.exchange, operation, target, source, num_bytes, stream)

    def run(self, operations: StreamOperations, stream: int) -> None:
        self._inner.run(operations, stream)
        steps = operations.steps
        operation = "signal" if all(step.value and not step.waits for step in steps) else "wait"
        assert self._log.exchange is not None
        self._log.stepped(self._log.exchange, operation, steps, stream)

    def capture(self, stream: int, queue: Callable[[], None]) -> Replay:
        return cast("Replay", _Again(queue))


class _Again:
    """Stands in for a replay."""

    def __init__(self, queue: Callable[[], None]) -> None:
        self._queue = queue

    def queue(self, stream: int) -> None:
        self._queue()


class _LoggedStreams:
    """`CommStreams` that forward to others and log their events.

    A comm stream forks from the compute stream when it is first used and first used after a join: see
    `CudaStreams.queue_on`. Only joins by `join` are known here.
    """

    def __init__(self, inner: CommStreams, log: MailboxLog, names: dict[int | None, str]) -> None:
        self._inner = inner
        self._log = log
        self._names = names
        self._numbers: dict[int, int] = {}  # by id, which an event keeps for as long as it can be waited for
        self._num_events = 0
        self._forked: list[str] = []
        self._start = ""  # the event of the first fork

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def compute_handle(self) -> int:
        return self._inner.compute_handle

    @property
    def capturing(self) -> bool:
        return self._inner.capturing

    def record(self) -> Event:
        return self._recorded(self._inner.record, _COMPUTE)

    def record_on(self, name: str) -> Event:
        return self._recorded(lambda: self._inner.record_on(name), name)

    def wait(self, event: Event) -> None:
        self._inner.wait(event)
        self._log.passed(Action.AWAIT, self._name(event), _COMPUTE)

    def queue_on(self, name: str, *, after: Event | None = None) -> int:
        handle = self._inner.queue_on(name, after=after)
        self._names.setdefault(handle, name)
        if name not in self._forked:
            if not self._forked:
                self._start = self._passed(_COMPUTE)
            self._forked.append(name)
            if after is None:
                self._log.passed(Action.AWAIT, self._start, name)
        if after is not None:
            self._log.passed(Action.AWAIT, self._name(after), name)
        return handle

    def join(self) -> None:
        """Join as `CudaStreams.join` does."""
        cast("CudaStreams", self._inner).join()
        for name in self._forked:
            self._log.passed(Action.AWAIT, self._passed(name), _COMPUTE)
        self._forked.clear()

    def _recorded(self, record: Callable[[], Event], stream: str) -> Event:
        event = record()
        self._numbers[id(event)] = self._num_events + 1
        self._passed(stream)
        return event

    def _passed(self, stream: str) -> str:
        """Log that a new event is recorded, and return its name."""
        self._num_events += 1
        event = f"event {self._num_events}"
        self._log.passed(Action.RECORD, event, stream)
        return event

    def _name(self, event: Event) -> str:
        return f"event {self._numbers[id(event)]}"
