"""Checks the order of what the ranks queued: no races, no endless waits, no flag used twice, nothing read too early.

    problems = check([log.events for log in logs])  # the logs of all ranks; [] if there are no problems

Operations are ordered by their stream, by an event that one stream records and another awaits, and by a flag, from its
k-th set to its k-th wait. Every operation gets a vector clock with one number per stream of each rank (Lamport 1978,
Mattern 1989). Only the newest accesses to a byte are kept, and the clock of an access is one number, as in FastTrack
(Flanagan and Freund 2009), so a check takes little longer than reading the logs.

The check covers the order in which operations start and end, not what the hardware does inside one (docs/protocol.md).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from antiphon.comm.slab.mailbox import Phase
from tests.support.protocol_log import NAMELESS, Action, LoggedEvent

Clock = list[int]


def check(logs: Sequence[Sequence[LoggedEvent]]) -> list[str]:
    """Find the problems in the logs of all ranks, which must begin and end at the same exchanges. One text per problem.

    - two accesses to the same bytes, at least one of them a write, in no order
    - bytes read that were not written in the same lane, phase and round
    - a wait that never ends; a set that nobody waits for, or that is never cleared
    - a flag set or waited for again before its clear is known to have happened, or cleared before its wait
    - an access to memory that no rank has named

    Problems of the same operations at the same place share the text of the first, followed by their number. The order
    of the logs may change how a race is described, but not whether there is a problem.
    """
    return _Checker(logs).run()


class _Past(NamedTuple):
    """An operation that has been taken: the number of its stream, and its time on that stream."""

    stream: int
    time: int
    event: LoggedEvent

    def before(self, clock: Clock) -> bool:
        return clock[self.stream] >= self.time


class _Fragment(NamedTuple):
    """Bytes that were last written or read by one event."""

    start: int
    stop: int
    past: _Past

    def without(self, start: int, stop: int) -> list[_Fragment]:
        """What remains of it outside start to stop."""
        rest = []
        if self.start < start:
            rest.append(_Fragment(self.start, start, self.past))
        if stop < self.stop:
            rest.append(_Fragment(stop, self.stop, self.past))
        return rest


class _Memory:
    """The latest writes, which do not overlap, and the reads since then."""

    __slots__ = ("reads", "writes")

    def __init__(self) -> None:
        self.writes: list[_Fragment] = []
        self.reads: list[_Fragment] = []


class _Flag:
    __slots__ = ("clears", "sets", "waits")

    def __init__(self) -> None:
        self.sets: list[tuple[_Past, Clock]] = []
        self.waits: list[_Past] = []
        self.clears: list[_Past] = []


class _Checker:
    def __init__(self, logs: Sequence[Sequence[LoggedEvent]]) -> None:
        queues: dict[tuple[int, str], deque[LoggedEvent]] = defaultdict(deque)
        for log in logs:
            for event in log:
                queues[event.rank, event.stream].append(event)
        self._queues = list(queues.values())
        self._clocks: list[Clock] = [[0] * len(queues) for _ in queues]
        self._memories: dict[str, _Memory] = defaultdict(_Memory)
        self._flags: dict[str, _Flag] = defaultdict(_Flag)
        self._recorded: dict[tuple[int, str], Clock] = {}
        self._problems: dict[tuple[object, ...], list[str]] = {}

    def run(self) -> list[str]:
        """Take operations off the streams in any order that flags and events allow; the clocks are the same in all."""
        ready = deque(range(len(self._queues)))
        waiting: dict[tuple[int, str], list[int]] = defaultdict(list)  # numbers of streams, by what they wait for
        while ready:
            stream = ready.popleft()
            queue = self._queues[stream]
            while queue:
                event = queue[0]
                if self._is_blocked(event):
                    waiting[_key(event)].append(stream)
                    break
                self._take(stream, queue.popleft())
                if event.action in (Action.SET, Action.RECORD):
                    ready.extend(waiting.pop(_key(event), ()))
        if any(self._queues):
            self._report_stuck()
        else:
            self._report_flags_left()
        return [
            text + (f" (and {len(texts) - 1} more like it)" if len(texts) > 1 else "")
            for texts in self._problems.values()
            for text in texts[:1]
        ]

    def _is_blocked(self, event: LoggedEvent) -> bool:
        if event.action is Action.WAIT:
            flag = self._flags[event.place]
            return len(flag.sets) <= len(flag.waits)
        return event.action is Action.AWAIT and _key(event) not in self._recorded

    def _take(self, stream: int, event: LoggedEvent) -> None:
        clock = self._clocks[stream]
        clock[stream] += 1
        past = _Past(stream, clock[stream], event)
        if event.action is Action.READ:
            self._read(past, clock)
        elif event.action is Action.WRITE:
            self._write(past, clock)
        elif event.action is Action.SET:
            self._set(past, clock)
        elif event.action is Action.WAIT:
            self._wait(past, clock)
        elif event.action is Action.CLEAR:
            self._clear(past, clock)
        elif event.action is Action.RECORD:
            self._recorded[_key(event)] = list(clock)
        else:
            _join(clock, self._recorded[_key(event)])

    # ---- memory

    def _read(self, past: _Past, clock: Clock) -> None:
        event = past.event
        memory = self._memory_of(event)
        covered = []
        for write in memory.writes:
            if write.start < event.stop and event.start < write.stop:
                if not write.past.before(clock):
                    self._report_race(write, past)
                if _exchange(write.past.event) == _exchange(event):
                    covered.append((write.start, write.stop))
        self._check_cover(covered, memory, event)
        memory.reads = [
            read
            for read in memory.reads
            if read.start < event.start or event.stop < read.stop or not read.past.before(clock)
        ]
        memory.reads.append(_Fragment(event.start, event.stop, past))

    def _write(self, past: _Past, clock: Clock) -> None:
        event = past.event
        memory = self._memory_of(event)
        for fragments in (memory.writes, memory.reads):
            kept = []
            for fragment in fragments:
                if fragment.start < event.stop and event.start < fragment.stop:
                    if not fragment.past.before(clock):
                        self._report_race(fragment, past)
                    kept += fragment.without(event.start, event.stop)
                else:
                    kept.append(fragment)
            fragments[:] = kept
        memory.writes.append(_Fragment(event.start, event.stop, past))

    def _memory_of(self, event: LoggedEvent) -> _Memory:
        if event.place.startswith(NAMELESS):
            self._report(
                f"{_who(event)} {event.action.value} {event.stop - event.start} bytes of {event.place}",
                event.rank,
                event.operation,
            )
        return self._memories[event.place]

    def _check_cover(self, covered: list[tuple[int, int]], memory: _Memory, event: LoggedEvent) -> None:
        reached = event.start
        for start, stop in sorted(covered):
            if start > reached:
                break
            reached = max(reached, stop)
        if reached >= event.stop:
            return
        before = [write.past.event for write in memory.writes if write.start <= reached < write.stop]
        found = f"what {_who(before[0])} wrote" if before else "what nobody has written"
        self._report(
            f"{event.place}, byte {reached}: {_who(event)} reads {found}, not what this round brought",
            event.place,
            event.rank,
            event.operation,
        )

    def _report_race(self, fragment: _Fragment, past: _Past) -> None:
        first, second = fragment.past.event, past.event
        start, stop = max(fragment.start, second.start), min(fragment.stop, second.stop)
        self._report(
            f"{second.place}, bytes {start} to {stop}: {_who(first)} {first.action.value}, "
            f"{_who(second)} {second.action.value}, in no order",
            second.place,
            *((event.rank, event.operation, event.action) for event in (first, second)),
        )

    # ---- flags

    def _set(self, past: _Past, clock: Clock) -> None:
        flag = self._flags[past.event.place]
        self._check_cleared(flag, len(flag.sets), past, clock)
        flag.sets.append((past, list(clock)))

    def _wait(self, past: _Past, clock: Clock) -> None:
        flag = self._flags[past.event.place]
        self._check_cleared(flag, len(flag.waits), past, clock)
        _join(clock, flag.sets[len(flag.waits)][1])
        flag.waits.append(past)

    def _clear(self, past: _Past, clock: Clock) -> None:
        flag = self._flags[past.event.place]
        number = len(flag.clears)
        if number >= len(flag.waits) or not flag.waits[number].before(clock):
            self._report_flag(past.event, "not known to be after its wait")
        flag.clears.append(past)

    def _check_cleared(self, flag: _Flag, number: int, past: _Past, clock: Clock) -> None:
        """Report a flag that is used again after `number` uses without being known to be cleared as often."""
        if number and (len(flag.clears) < number or not flag.clears[number - 1].before(clock)):
            self._report_flag(past.event, "not known to be after the previous clear")

    def _report_flag(self, event: LoggedEvent, what: str) -> None:
        self._report(
            f"{event.place}: {_who(event)} {event.action.value} it, {what}",
            event.place,
            event.rank,
            event.operation,
            what,
        )

    def _report_stuck(self) -> None:
        heads = [queue[0] for queue in self._queues if queue and queue[0].action is Action.WAIT]
        for event in (queue[0] for queue in self._queues if queue):
            if event.action is Action.AWAIT and not any(_records(queue, event) for queue in self._queues):
                text = f"{event.place} of rank {event.rank}: its {event.stream} stream awaits it, nobody records it"
                self._report(text, event.place, event.rank)
        sets_ahead = {event.place for queue in self._queues for event in queue if event.action is Action.SET}
        without_set = [event for event in heads if event.place not in sets_ahead]
        for event in without_set:
            self._report(f"{event.place}: {_who(event)} waits forever: nobody sets it", event.place)
        for event in heads if not without_set else ():
            self._report(f"{event.place}: {_who(event)} waits forever: the next set comes only after it", event.place)

    def _report_flags_left(self) -> None:
        for place, flag in self._flags.items():
            if len(flag.waits) < len(flag.sets):
                self._report(f"{place}: {_who(flag.sets[-1][0].event)} sets it, nobody waits for it", place)
            elif len(flag.clears) < len(flag.sets):
                self._report(f"{place}: {_who(flag.sets[-1][0].event)} sets it, nobody clears it", place)

    def _report(self, text: str, *kind: object) -> None:
        self._problems.setdefault(kind, []).append(text)


def _key(event: LoggedEvent) -> tuple[int, str]:
    """The key of a stream event, which belongs to one rank, or of a flag, which belongs to all."""
    return (event.rank if event.action in (Action.RECORD, Action.AWAIT) else -1, event.place)


def _records(queue: deque[LoggedEvent], awaited: LoggedEvent) -> bool:
    return any(event.action is Action.RECORD and _key(event) == _key(awaited) for event in queue)


def _join(clock: Clock, other: Clock) -> None:
    for stream, time in enumerate(other):
        if time > clock[stream]:
            clock[stream] = time


def _exchange(event: LoggedEvent) -> tuple[int, int, int]:
    return event.lane, event.phase, event.round


def _who(event: LoggedEvent) -> str:
    label = event.label or Phase(event.phase).name.lower()
    return (
        f"the {event.operation} of rank {event.rank} on its {event.stream} stream "
        f"({label}, lane {event.lane}, round {event.round})"
    )
