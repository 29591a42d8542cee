"""How much communication a step hid, from its events.

    communication   time in which at least one communication was in flight: from its launch to its arrival
    exposed         time in which a lane blocked the host to wait for one
    hidden          communication - exposed: what compute covered

If nothing is sent (`local`), all three are 0. On a GPU, the stream waits for the data, not the host, so the transport
cannot tell when it arrived: all three are `None`, and `antiphon bench overlap` measures instead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from antiphon.runtime import EventKind, LaneEvent


@dataclass(slots=True, kw_only=True)
class StepTimeline:
    """One step of one rank. Times are `time.perf_counter_ns` in the rank's process.

    On a GPU, the host only queues work: the step's time is how long that takes, and no event says when data arrives.
    """

    number: int
    kind: str  # the plan's
    num_tokens: int  # of this rank
    start_ns: int
    end_ns: int = 0
    events: list[LaneEvent] = field(default_factory=list)
    replayed_bytes: int = 0  # sent by a replay, in which the host sees no events

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) * 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOverlap:
    """The overlap of one step on one rank. `None` means not observed."""

    time_s: float
    communication_s: float | None
    exposed_s: float | None
    hidden_s: float | None
    num_bytes: int


def measure_overlap(step: StepTimeline) -> StepOverlap:
    """Compute the overlap of a finished step."""
    if step.replayed_bytes:
        return StepOverlap(
            time_s=step.duration_s,
            communication_s=None,
            exposed_s=None,
            hidden_s=None,
            num_bytes=step.replayed_bytes,
        )
    launched_ns: dict[int, int] = {}
    wait_start_ns: dict[int, int] = {}
    intervals: list[tuple[int, int]] = []
    exposed_ns = num_bytes = num_sent = num_observed = 0
    for event in step.events:
        if event.kind in (EventKind.SENT, EventKind.LAUNCHED):
            launched_ns[event.pending] = event.time_ns
        elif event.kind is EventKind.WAIT:
            wait_start_ns[event.pending] = event.time_ns
        elif event.kind is EventKind.ARRIVED and (event.ready_ns is not None or event.num_messages):
            num_bytes += event.num_bytes
            num_sent += bool(event.num_messages)
            if event.ready_ns is not None:
                num_observed += bool(event.num_messages)
                intervals.append((launched_ns[event.pending], min(event.ready_ns, event.time_ns)))
                exposed_ns += max(0, min(event.ready_ns, event.time_ns) - wait_start_ns[event.pending])
    if num_sent and not num_observed:  # the counts that a dispatch may wait for are not a message
        return StepOverlap(
            time_s=step.duration_s, communication_s=None, exposed_s=None, hidden_s=None, num_bytes=num_bytes
        )
    communication_ns = _union_ns(intervals)
    return StepOverlap(
        time_s=step.duration_s,
        communication_s=communication_ns * 1e-9,
        exposed_s=exposed_ns * 1e-9,
        hidden_s=max(0, communication_ns - exposed_ns) * 1e-9,
        num_bytes=num_bytes,
    )


def _union_ns(intervals: list[tuple[int, int]]) -> int:
    total = covered_until = 0
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, covered_until))
        covered_until = max(covered_until, stop)
    return total


_OBSERVED = ("communication_s", "exposed_s", "hidden_s")


class OverlapTotals:
    """Sums of step overlaps by kind of plan."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Any]] = {}
        self._unseen: set[str] = set()  # kinds with unobserved steps, and without an observed step that sent something

    def add(self, kind: str, overlap: StepOverlap) -> None:
        """Add one step. An unobserved one adds only its time and bytes."""
        added = asdict(overlap)
        sums = self._sums.setdefault(kind, dict.fromkeys(added, 0))
        for name, value in added.items():
            sums[name] += value or 0
        if overlap.communication_s is None:
            if not sums["communication_s"]:
                self._unseen.add(kind)
        elif overlap.num_bytes:
            self._unseen.discard(kind)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """`{kind: {time_s, communication_s, exposed_s, hidden_s, num_bytes}}`; `None` if no step observed it."""
        unknown = dict.fromkeys(_OBSERVED)
        return {kind: sums | (unknown if kind in self._unseen else {}) for kind, sums in self._sums.items()}
