"""Ways to break the slab protocol. Each one changes the transports of a `ProtocolWorld` before they run.

A mutation changes what is queued, or only what is logged where that makes no difference to the checker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from antiphon.comm.slab.mailbox import Exchange, Phase
from antiphon.comm.slab.transport import SlabTransport
from antiphon.device.cuda_stream_memory import MemoryStep
from tests.comm.protocol_checks import MEDIA, ProtocolWorld
from tests.support.protocol_log import Action, LoggedMailbox, MailboxLog

__all__ = ["MUTATIONS", "Mutation"]

Change = Callable[[ProtocolWorld], None]


@dataclass(frozen=True, slots=True)
class Mutation:
    """A change, and regular expressions that each must match at least one of the problems found."""

    change: Change
    medium: str
    found: tuple[str, ...]


def _ends(world: ProtocolWorld) -> Iterator[tuple[SlabTransport, Any, MailboxLog]]:
    """Each transport, the mailbox of its medium, and its log."""
    for transport, log in zip(world.transports, world.recorders, strict=True):
        assert isinstance(transport.mailbox, LoggedMailbox)
        yield transport, transport.mailbox.inner, log


def no_signal_without_rows(world: ProtocolWorld) -> None:
    for _, mailbox, _ in _ends(world):

        def signal(exchange: Exchange, inner: Callable[[Exchange], None] = mailbox.signal) -> None:
            if any(put.source.numel() for put in exchange.puts):
                inner(exchange)

        mailbox.signal = signal


def wait_leaves_out_a_peer(world: ProtocolWorld) -> None:
    """Rank 0 does not wait for the last peer, but clears its flag."""
    transport, mailbox, _ = next(_ends(world))
    last = transport.group.size - 1
    if transport.name == "shared-memory":
        inner = mailbox.wait
        mailbox.wait = lambda exchange: inner(
            replace(exchange, arrivals=tuple(arrival for arrival in exchange.arrivals if arrival.peer != last))
        )
    elif transport.name == "copy-engine":
        for (lane, phase), wait in mailbox._waits.items():
            flag = mailbox._flag(0, lane, phase, last)
            steps = wait.operations.steps
            steps[:] = [step for step in steps if not (step.waits and step.address == flag)]
    else:
        _change_chunk_waits(
            mailbox,
            lambda wait, peer: [step for step in wait.steps if not (step.waits and peer == last)],
        )


def nobody_waits(world: ProtocolWorld) -> None:
    for _, mailbox, _ in _ends(world):
        mailbox.wait = mailbox.reset = lambda exchange: None


def pack_before_the_combine_is_there(world: ProtocolWorld) -> None:
    """The next dispatch is packed while this combine is in flight, over the bytes of this round's dispatch."""
    for _, mailbox, log in _ends(world):

        def wait(exchange: Exchange, inner: Any = mailbox.wait, log: MailboxLog = log) -> None:
            packs = [e for e in log.events if e.operation == "pack" and e.lane == exchange.lane]
            if exchange.phase is Phase.COMBINE and packs:
                log.events.append(packs[-1]._replace(round=packs[-1].round + 1))
            inner(exchange)

        mailbox.wait = wait


def puts_before_the_compute_so_far(world: ProtocolWorld) -> None:
    _change_streams(world, lambda name, after: (name, None if name in ("comm", "up") else after))


def signal_on_another_stream(world: ProtocolWorld) -> None:
    _change_streams(world, lambda name, after: (name if after is not None else f"other {name}", after))


def reset_behind_the_next_signal(world: ProtocolWorld) -> None:
    for transport, mailbox, log in _ends(world):
        late: dict[int, list[Callable[[], None]]] = {}

        def signal(exchange: Exchange, inner: Any = mailbox.signal, late: Any = late) -> None:
            inner(exchange)
            for reset in late.pop(exchange.lane, ()):
                reset()

        mailbox.signal = signal
        if transport.name == "shared-memory":

            def postpone(exchange: Exchange, inner: Any = mailbox.reset, late: Any = late) -> None:
                late.setdefault(exchange.lane, []).append(lambda: inner(exchange))

            mailbox.reset = postpone
        elif transport.name == "copy-engine":

            def wait(exchange: Exchange, mailbox: Any = mailbox, log: Any = log, late: Any = late) -> None:
                steps = mailbox._waits[exchange.lane, exchange.phase].operations.steps
                stream = mailbox.streams.compute_handle
                log.stepped(exchange, "wait", [step for step in steps if step.waits], stream)
                clears = [step for step in steps if not step.waits]
                late.setdefault(exchange.lane, []).append(lambda: log.stepped(exchange, "reset", clears, stream))

            mailbox.wait = wait
        else:

            def download(
                exchange: Exchange,
                stream: int,
                inner: Any = mailbox._download,
                mailbox: Any = mailbox,
                log: Any = log,
                late: Any = late,
            ) -> None:
                begin = len(log.events)
                inner(exchange, stream)
                clears = [event for event in log.events[begin:] if event.action is Action.CLEAR]
                log.events[begin:] = [event for event in log.events[begin:] if event.action is not Action.CLEAR]
                late.setdefault(exchange.lane, []).append(lambda: log.events.extend(clears))

            def behind_two_signals(exchange: Exchange, inner: Any = mailbox.signal, late: Any = late) -> None:
                """Reset after the next exchange's signal, as an exchange's own signal comes after its download."""
                mine = late.pop(exchange.lane, [])
                inner(exchange)
                for reset in mine[:-1]:
                    reset()
                late[exchange.lane] = mine[-1:]

            mailbox._download, mailbox.signal = download, behind_two_signals


def signal_before_the_put(world: ProtocolWorld) -> None:
    for _, mailbox, _ in _ends(world):

        def put(exchange: Exchange, put: Any = mailbox.put, signal: Any = mailbox.signal) -> None:
            signal(exchange)
            put(exchange)

        mailbox.put, mailbox.signal = put, lambda exchange: None


def partial_sums_of_both_lanes_in_one_memory(world: ProtocolWorld) -> None:
    for transport, _, _ in _ends(world):
        transport.partial_sums[1] = transport.partial_sums[0]


def one_box_for_both_lanes(world: ProtocolWorld) -> None:
    for transport, mailbox, _ in _ends(world):
        if transport.name == "shared-memory":
            for boxes in mailbox._boxes:
                boxes[1] = boxes[0]
        else:
            mailbox._boxes[1] = mailbox._boxes[0]
            if transport.name == "copy-engine":
                mailbox._offsets[1] = mailbox._offsets[0]


def one_outgoing_slab_for_both_lanes(world: ProtocolWorld) -> None:
    for _, mailbox, _ in _ends(world):
        mailbox._lane_starts[1] = mailbox._lane_starts[0]


def one_flag_for_both_lanes(world: ProtocolWorld) -> None:
    for transport, mailbox, _ in _ends(world):
        if transport.name == "shared-memory":
            mailbox._word = lambda lane, phase, source, inner=mailbox._word: inner(0, phase, source)
        elif transport.name == "copy-engine":
            for phase in Phase:
                mailbox._signals[1, phase] = mailbox._signals[0, phase]
                mailbox._waits[1, phase] = mailbox._waits[0, phase]
        else:
            mailbox._flag = lambda reader, lane, phase, source, chunk, inner=mailbox._flag: inner(
                reader, 0, phase, source, chunk
            )


def arrival_recorded_before_the_downloads(world: ProtocolWorld) -> None:
    for _, mailbox, _ in _ends(world):

        def put(exchange: Exchange, inner: Any = mailbox.put, mailbox: Any = mailbox) -> None:
            early = mailbox.streams.record_on("down")
            inner(exchange)
            mailbox._arrived[exchange.lane][exchange.phase] = early

        mailbox.put = put


def slabs_at_a_wrong_offset(world: ProtocolWorld) -> None:
    """The slabs of rank 0 land 64 bytes too far into every box."""
    for transport, mailbox, _ in _ends(world):

        def put(exchange: Exchange, inner: Any = mailbox.put, rank: int = transport.group.rank) -> None:
            puts = exchange.puts if rank else tuple(replace(put, offset=put.offset + 64) for put in exchange.puts)
            arrivals = tuple(
                arrival if arrival.peer else replace(arrival, offset=arrival.offset + 64)
                for arrival in exchange.arrivals
            )
            inner(replace(exchange, puts=puts, arrivals=arrivals))

        mailbox.put = put


def slabs_outside_all_memory(world: ProtocolWorld) -> None:
    transport, mailbox, _ = next(_ends(world))
    if transport.name == "copy-engine":
        mailbox._bases[1] += 1 << 40
    else:
        inner = mailbox._slab_at
        mailbox._slab_at = lambda *where: inner(*where) + (1 << 40)


def _change_chunk_waits(mailbox: Any, steps_of: Callable[[Any, int], list[MemoryStep]]) -> None:
    inner = mailbox._wait_for

    def wait_for(exchange: Exchange, peer: int, chunk: int) -> Any:
        wait = inner(exchange, peer, chunk)
        return SimpleNamespace(queue=wait.queue, steps=steps_of(wait, peer))

    mailbox._wait_for = wait_for


class _ChangedStreams:
    def __init__(self, inner: Any, change: Callable[[str, Any], tuple[str, Any]]) -> None:
        self._inner = inner
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def queue_on(self, name: str, *, after: Any = None) -> int:
        name, after = self._change(name, after)
        handle: int = self._inner.queue_on(name, after=after)
        return handle


def _change_streams(world: ProtocolWorld, change: Callable[[str, Any], tuple[str, Any]]) -> None:
    for _, mailbox, _ in _ends(world):
        mailbox.streams = _ChangedStreams(mailbox.streams, change)


_RACE = "in no order"
_NOT_THIS_ROUND = "not what this round brought"
_NOT_CLEARED = "sets it, not known to be after the previous clear"
_NOT_WAITED = "clears it, not known to be after its wait"


def _everywhere(change: Change, *found: str) -> list[Mutation]:
    return [Mutation(change, medium, found) for medium in MEDIA]


def _on_devices(change: Change, *found: str) -> list[Mutation]:
    return [Mutation(change, medium, found) for medium in ("copy-engine", "host-staged")]


MUTATIONS = (
    *_everywhere(no_signal_without_rows, r"dispatch flag .* waits forever"),
    *_everywhere(wait_leaves_out_a_peer, _NOT_WAITED, f"(dispatch box|outgoing dispatch slab).*{_RACE}"),
    *_everywhere(nobody_waits, f"dispatch box.*{_NOT_THIS_ROUND}", f"combine box.*{_NOT_THIS_ROUND}"),
    *_everywhere(reset_behind_the_next_signal, _NOT_CLEARED),
    *_everywhere(signal_before_the_put, rf"(dispatch box|outgoing dispatch slab).*{_RACE}"),
    *_everywhere(one_box_for_both_lanes, f"dispatch box.*{_RACE}"),
    *_everywhere(one_flag_for_both_lanes, _NOT_CLEARED),
    *_everywhere(slabs_at_a_wrong_offset, f"dispatch box.*experts.*{_NOT_THIS_ROUND}"),
    Mutation(
        partial_sums_of_both_lanes_in_one_memory, "shared-memory", (f"partial sums.*local sum.*{_NOT_THIS_ROUND}",)
    ),
    *_on_devices(partial_sums_of_both_lanes_in_one_memory, f"partial sums.*{_RACE}"),
    *_on_devices(pack_before_the_combine_is_there, rf"(put|upload) .* reads, the pack .* writes, {_RACE}"),
    *_on_devices(puts_before_the_compute_so_far, rf"dispatch box.*(put|upload).*{_RACE}", rf"partial sums.*{_RACE}"),
    *_on_devices(slabs_outside_all_memory, "memory without a name"),
    Mutation(signal_on_another_stream, "copy-engine", (f"dispatch box.*put.*{_RACE}",)),
    Mutation(signal_on_another_stream, "host-staged", (f"outgoing dispatch slab.*upload.*{_RACE}",)),
    Mutation(one_outgoing_slab_for_both_lanes, "host-staged", (f"outgoing dispatch slab.*{_RACE}",)),
    Mutation(arrival_recorded_before_the_downloads, "host-staged", (f"dispatch box.*download.*{_RACE}",)),
)
