"""Counts of one rank since its start."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from antiphon.core.plan import Plan, plan_kind
from antiphon.timeline import OverlapTotals, StepTimeline, measure_overlap

logger = logging.getLogger("antiphon.engine")


@dataclass(slots=True)
class SchedulerStats:
    """Of all admissions, those after a preemption too: what was to be computed, and what was there already."""

    preemptions: int = 0
    admitted_tokens: int = 0
    hit_tokens: int = 0

    def admit(self, *, num_tokens: int, num_cached: int) -> None:
        self.admitted_tokens += num_tokens
        self.hit_tokens += num_cached

    def to_dict(self) -> dict[str, Any]:
        return {
            "preemptions": self.preemptions,
            "prefix_cache": {"admitted_tokens": self.admitted_tokens, "hit_tokens": self.hit_tokens},
        }


class StepStats:
    """Steps by plan, reasons of serial ones, and what was hidden."""

    def __init__(self, micro_batches: int) -> None:
        self._by_plan: Counter[str] = Counter({"serial": 0, plan_kind(micro_batches): 0})
        self._serial_reasons: Counter[str] = Counter()
        self._overlap = OverlapTotals()
        self._last_plan = ""
        self._measuring = True

    @property
    def num_steps(self) -> int:
        return self._by_plan.total()

    def add(self, plan: Plan, timeline: StepTimeline) -> None:
        """Count one step that has run."""
        self._by_plan[plan.kind] += 1
        if plan.num_lanes == 1:
            self._serial_reasons[plan.reason] += 1
        self._last_plan = str(plan)
        if self._measuring:
            self._measure(plan, timeline)

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.num_steps,
            "steps_by_plan": dict(self._by_plan),
            "serial_reasons": dict(self._serial_reasons),
            "last_plan": self._last_plan,
            "overlap": self._overlap.to_dict(),
        }

    def _measure(self, plan: Plan, timeline: StepTimeline) -> None:
        try:
            self._overlap.add(plan.kind, measure_overlap(timeline))
        except Exception as error:  # an instrument must not end the run
            self._measuring = False
            logger.warning("overlap is not measured any more: %r", error)
