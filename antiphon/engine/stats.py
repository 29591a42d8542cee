"""Counts of one rank since its start."""

from __future__ import annotations

from collections import Counter
from typing import Any

from antiphon.core.plan import Plan, plan_kind
from antiphon.timeline import OverlapTotals, StepTimeline, measure_overlap

__all__ = ["StepStats"]


class StepStats:
    """Steps by plan, reasons of serial ones, and what was hidden."""

    def __init__(self, micro_batches: int) -> None:
        self._by_plan: Counter[str] = Counter({"serial": 0, plan_kind(micro_batches): 0})
        self._serial_reasons: Counter[str] = Counter()
        self._overlap = OverlapTotals()

    @property
    def num_steps(self) -> int:
        return self._by_plan.total()

    def add(self, plan: Plan, timeline: StepTimeline) -> None:
        """Count one step that has run."""
        self._by_plan[plan.kind] += 1
        if plan.num_lanes == 1:
            self._serial_reasons[plan.reason] += 1
        self._overlap.add(plan.kind, measure_overlap(timeline))

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.num_steps,
            "steps_by_plan": dict(self._by_plan),
            "serial_reasons": dict(self._serial_reasons),
            "overlap": self._overlap.to_dict(),
        }
