"""Records the events of each step and keeps the last ones whole."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from antiphon.runtime import LaneEvent


@dataclass(slots=True, kw_only=True)
class StepTimeline:
    """One step of one rank. Times are `time.perf_counter_ns` of the rank's process: the host's.

    On a GPU the host only queues: the step's time is how long that took, and no event says when data arrived.
    """

    number: int
    kind: str  # the plan's
    num_tokens: int  # of this rank
    start_ns: int
    end_ns: int = 0
    events: list[LaneEvent] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) * 1e-9


class StepRecorder:
    """A recorder of lanes that cuts the stream of events into steps; keeps the last `num_kept` steps."""

    def __init__(self, num_kept: int = 64) -> None:
        self.steps: deque[StepTimeline] = deque(maxlen=num_kept)
        self._current: StepTimeline | None = None

    def on_event(self, event: LaneEvent) -> None:
        if self._current is not None:
            self._current.events.append(event)

    @contextmanager
    def step(self, number: int, *, kind: str, num_tokens: int) -> Iterator[StepTimeline]:
        """Record what happens inside as one step."""
        timeline = StepTimeline(number=number, kind=kind, num_tokens=num_tokens, start_ns=time.perf_counter_ns())
        self._current = timeline
        try:
            yield timeline
        finally:
            self._current = None
            timeline.end_ns = time.perf_counter_ns()
            self.steps.append(timeline)
