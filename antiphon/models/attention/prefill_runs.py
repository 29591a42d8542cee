"""Which slices of several tokens one call of attention can take."""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.core.batch import PrefillSlice


def prefill_runs(prefills: Sequence[PrefillSlice]) -> list[list[PrefillSlice]]:
    """All slices in order: neighbours of the same length without context together, every other one alone."""
    runs: list[list[PrefillSlice]] = []
    for prefill in prefills:
        if runs and _alike(runs[-1][-1], prefill):
            runs[-1].append(prefill)
        else:
            runs.append([prefill])
    return runs


def _alike(first: PrefillSlice, second: PrefillSlice) -> bool:
    same_length = first.stop - first.start == second.stop - second.start
    return same_length and first.stop == second.start and first.context_len == second.context_len == 0
