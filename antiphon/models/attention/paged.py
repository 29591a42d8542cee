"""One micro-batch's attention over the paged cache: a call for each run of prefill slices, and one for all decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from antiphon.core.batch import AttentionMetadata, DecodeGroup, PrefillSlice


def attend(
    metadata: AttentionMetadata,
    x_TD: torch.Tensor,
    width: int,
    *,
    prefill: Callable[[Sequence[PrefillSlice]], torch.Tensor],
    decode: Callable[[DecodeGroup], torch.Tensor],
) -> torch.Tensor:
    """The attention of all tokens, heads side by side: [T, width], like `x_TD` in device and dtype.

    prefill: computes the rows of one run of slices. decode: computes the rows of a group.
    """
    runs = _prefill_runs(metadata.prefills)
    parts_TX = [prefill(run) for run in runs]
    if metadata.decodes is None and len(parts_TX) == 1:
        return parts_TX[0]  # one call took all tokens: nothing to put together
    out_TX = x_TD.new_empty(x_TD.shape[0], width)
    for run, part_TX in zip(runs, parts_TX, strict=True):
        out_TX[run[0].start : run[-1].stop] = part_TX
    if metadata.decodes is not None:
        out_TX[metadata.decodes.rows_N] = decode(metadata.decodes)
    return out_TX


def _prefill_runs(prefills: Sequence[PrefillSlice]) -> list[list[PrefillSlice]]:
    """All slices in order: neighbors of the same length without context together, every other one alone."""
    runs: list[list[PrefillSlice]] = []
    for prefill in prefills:
        if runs and _can_share_a_call(runs[-1][-1], prefill):
            runs[-1].append(prefill)
        else:
            runs.append([prefill])
    return runs


def _can_share_a_call(first: PrefillSlice, second: PrefillSlice) -> bool:
    same_length = first.stop - first.start == second.stop - second.start
    return same_length and first.stop == second.start and first.context_len == second.context_len == 0
