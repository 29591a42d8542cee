"""Records the events of each step, keeps the last steps, and sums the overlap of all steps."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from antiphon.runtime import LaneEvent
from antiphon.timeline.overlap import OverlapTotals, StepTimeline, measure_overlap

logger = logging.getLogger("antiphon.timeline")


def _ignore(event: LaneEvent) -> None:
    """Drops events between two steps."""


class StepRecorder:
    """A recorder of lanes that divides the stream of events into steps.

    steps: the last `num_kept` steps. totals: the overlap of all successful steps. If measuring fails, it is switched
    off with one warning, and the run continues.
    """

    def __init__(self, num_kept: int = 64) -> None:
        self.steps: deque[StepTimeline] = deque(maxlen=num_kept)
        self.totals = OverlapTotals()
        self.on_event: Callable[[LaneEvent], None] = _ignore  # during a step, appends to its events
        self._measuring = True

    @contextmanager
    def step(self, number: int, *, kind: str, num_tokens: int) -> Iterator[StepTimeline]:
        """Record what happens inside as one step."""
        timeline = StepTimeline(number=number, kind=kind, num_tokens=num_tokens, start_ns=time.perf_counter_ns())
        self.on_event = timeline.events.append
        try:
            yield timeline
        finally:
            self.on_event = _ignore
            timeline.end_ns = time.perf_counter_ns()
            self.steps.append(timeline)
        if self._measuring:
            self._measure(timeline)

    def _measure(self, timeline: StepTimeline) -> None:
        try:
            self.totals.add(timeline.kind, measure_overlap(timeline))
        except Exception as error:  # an instrument must not end the run
            self._measuring = False
            logger.warning("overlap is no longer measured: %r", error)
