"""A communication that was sent but not yet waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from antiphon.core.errors import LaneError
from antiphon.runtime.hook import EventKind
from antiphon.runtime.lane import Lane, running_lane

T = TypeVar("T")


class Pending(Generic[T]):
    """The result of a communication in flight.

    wait: returns the result. On a GPU the compute stream waits for the arrival; on the CPU the host blocks.
    label: what is in flight ("dispatch layer 3"); it names the switch in recordings and errors.
    launch: starts a communication for which the host must wait first (late launch). `finish` calls it after its switch,
        so that the other lane's work is already queued.
    abandon: releases what the pending holds when its lane is cancelled; it must not block for long.
    ready_ns: called after `wait`; when the data was complete (`time.perf_counter_ns`), or `None` if that is unknown.
    num_bytes, num_messages: traffic to or from other ranks, whichever direction has more.

    A pending belongs to the lane that created it and is finished exactly once, by `finish`. It must not outlive its
    lane: a lane that returns without finishing it raises an error, because its buffers may still be written.
    """

    __slots__ = ("_abandon", "_lane", "_launch", "_number", "_ready_ns", "_wait", "label", "num_bytes", "num_messages")

    def __init__(
        self,
        wait: Callable[[], T],
        *,
        label: str,
        launch: Callable[[], None] | None = None,
        abandon: Callable[[], None] | None = None,
        ready_ns: Callable[[], int | None] | None = None,
        num_bytes: int = 0,
        num_messages: int = 1,
    ) -> None:
        self._wait: Callable[[], T] | None = wait
        self._launch = launch
        self._abandon = abandon
        self._ready_ns = ready_ns
        self.label = label
        self.num_bytes = num_bytes
        self.num_messages = num_messages
        self._lane = running_lane()
        self._number = -1
        if self._lane is not None:
            self._number = self._lane.add_pending(self)
            self._emit(EventKind.SENT)

    @staticmethod
    def done(value: T, *, label: str) -> Pending[T]:
        """A pending whose result is already available, without communication."""
        return Pending(lambda: value, label=label, num_messages=0)

    def wait(self) -> T:
        """Wait for the result and return it. Never switches; model code calls `finish`, which switches first."""
        lane = running_lane()
        if lane is not self._lane:
            raise LaneError(
                f"pending {self.label!r} was sent by {_name(self._lane)} and waited for by {_name(lane)}",
                remedy="finish it in the lane that sent it",
            )
        wait = self._take_wait()
        self._emit(EventKind.WAIT)
        try:
            if self._launch is not None:
                self._launch()
                self._launch = None  # it may hold this pending
                self._emit(EventKind.LAUNCHED)
            result = wait()
        except BaseException as error:
            try:
                self.abandon()
            except Exception as second:
                error.add_note(f"abandoning {self.label!r} also failed: {second!r}")
            raise
        self._close()
        if self._lane is not None:
            self._emit(EventKind.ARRIVED, self._ready_ns() if self._ready_ns is not None else None)
        return result

    def abandon(self) -> None:
        """Give up the pending without its result. The runtime calls it for cancelled lanes."""
        self._wait = self._launch = None
        self._close()
        if self._abandon is not None:
            self._abandon()

    def _take_wait(self) -> Callable[[], T]:
        if self._wait is None:
            raise LaneError(f"pending {self.label!r} was already finished", limit="a pending is finished exactly once")
        wait, self._wait = self._wait, None
        return wait

    def _close(self) -> None:
        if self._lane is not None:
            self._lane.pendings.pop(self._number, None)

    def _emit(self, kind: EventKind, ready_ns: int | None = None) -> None:
        if self._lane is not None:
            self._lane.hook.emit(
                kind, self._lane.index, self.label, self._number, self.num_bytes, self.num_messages, ready_ns
            )


def _name(lane: Lane | None) -> str:
    return "no lane" if lane is None else f"lane {lane.index}"
