"""The recorder hook: passes the events of a run of lanes to a recorder.

Without a recorder an event costs one lookup. A recorder that raises is dropped with one warning, and the run continues.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

logger = logging.getLogger("antiphon.runtime")


class EventKind(Enum):
    """What happened to a lane."""

    START = "start"
    SWITCH_OUT = "switch-out"
    SWITCH_IN = "switch-in"
    SENT = "sent"  # a pending was created; its communication was launched, except with late launch
    LAUNCHED = "launched"  # a late launch
    WAIT = "wait"  # the lane starts to wait for the pending
    ARRIVED = "arrived"  # the wait is over
    END = "end"


@dataclass(frozen=True, slots=True)
class LaneEvent:
    """One event. `pending` is the number of the pending within the run, -1 if the event has none.

    `ready_ns` is when the data of an ARRIVED pending was complete; `None` if the transport cannot tell.
    """

    kind: EventKind
    lane: int
    label: str
    time_ns: int
    pending: int = -1
    num_bytes: int = 0
    num_messages: int = 0
    ready_ns: int | None = None


class Recorder(Protocol):
    """Receives every event of a run, in order, on the host thread that runs the lanes."""

    def on_event(self, event: LaneEvent) -> None: ...


class Hook:
    """Holds at most one recorder and drops it when it fails."""

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder

    def emit(
        self,
        kind: EventKind,
        lane: int,
        label: str,
        pending: int = -1,
        num_bytes: int = 0,
        num_messages: int = 0,
        ready_ns: int | None = None,
    ) -> None:
        if self._recorder is None:
            return
        try:
            self._recorder.on_event(
                LaneEvent(kind, lane, label, time.perf_counter_ns(), pending, num_bytes, num_messages, ready_ns),
            )
        except Exception as error:
            logger.warning("the recorder failed and is disabled for the rest of this run: %r", error)
            self._recorder = None
