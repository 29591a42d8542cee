"""Pure functions that derive the figures of a step from its times. docs/glossary.md defines them.

    S   serial           C   compute only, serial      M   communication only
    D   with overlap     C2  compute only, split

Times may have any unit, the same for all. A figure whose denominator is not positive is `None`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """The repeats of one measurement."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Summary:
        return Summary(float(statistics.median(values)), float(min(values)), float(max(values)))

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.min, "max": self.max}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """One transport's times of a step, in ms."""

    S: float
    C: float
    D: float
    C2: float
    M: float


def slowest_rank(values_by_rank: Sequence[Sequence[float]]) -> list[float]:
    """The time of the slowest rank in each repeat, because a step ends when its last rank does."""
    return [max(values) for values in zip(*values_by_rank, strict=True)]


def overlap_efficiency(compute: float, communication: float, both: float) -> float | None:
    """(C2 + M - D) / min(C2, M): 1 if the shorter of the two is hidden completely, 0 if nothing is.

    Above 1 if both together take less time than the longer one alone, which noise can cause.
    """
    return _ratio(compute + communication - both, min(compute, communication))


def step_figures(times: StepTimes, *, best_serial: float) -> dict[str, float | None]:
    """The figures that the glossary defines on S, C, C2, M and D. best_serial: the smallest S of all transports."""
    longer = max(times.C2, times.M)
    return {
        "serial_over_dual": _ratio(times.S, times.D),
        "best_serial_over_dual": _ratio(best_serial, times.D),
        "split_penalty_ms": times.C2 - times.C,
        "excess_ms": times.D - longer,
        "recovered": _ratio(times.S - times.D, times.S - times.C),
        "overlap_efficiency": overlap_efficiency(times.C2, times.M, times.D),
        "roofline_attainment": _ratio(longer, times.D),
    }


def gigabytes_per_s(num_bytes: float, time_ms: float) -> float | None:
    """Bandwidth in units of 10^9 bytes per second."""
    return _ratio(num_bytes * 1e-6, time_ms)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
