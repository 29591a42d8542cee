"""One micro-batch's attention over the paged cache: a call for each run of prefill slices, and one for all decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from antiphon.core.batch import AttentionMetadata, DecodeGroup, PrefillSlice


def attend(
    metadata: AttentionMetadata,
    q_THQ: torch.Tensor,
    *keys_values_T: torch.Tensor,
    width: int,
    prefill: Callable[..., torch.Tensor],
    decode: Callable[[torch.Tensor, DecodeGroup], torch.Tensor],
) -> torch.Tensor:
    """The attention of all tokens, heads side by side: [T, width], like `q_THQ` in device and dtype.

    keys_values_T: the keys and values of the new tokens, in whatever form `prefill` takes them.
    prefill: computes [N, S, H, V] from the queries, keys and values of `N` slices of `S` new tokens, and from the slice
    if it has context (then N is 1) or None. decode: computes [N, H, V] from the queries of a group.
    """
    decodes = metadata.decodes
    if decodes is not None and not metadata.prefills:  # they are all rows, in order
        return decode(q_THQ, decodes).flatten(1)
    runs, parts_TX = _prefill_runs(metadata.prefills), []
    for run in runs:
        start, stop = run[0].start, run[-1].stop
        new_T = [x if stop - start == x.shape[0] else x[start:stop] for x in (q_THQ, *keys_values_T)]
        new_NS = [x.view(len(run), -1, *x.shape[1:]) for x in new_T]
        parts_TX.append(prefill(*new_NS, run[0] if run[0].context_len else None).reshape(stop - start, -1))
    if decodes is None and len(parts_TX) == 1:
        return parts_TX[0]  # one call computed all tokens
    out_TX = q_THQ.new_empty(q_THQ.shape[0], width)
    for run, part_TX in zip(runs, parts_TX, strict=True):
        out_TX[run[0].start : run[-1].stop] = part_TX
    if decodes is not None:
        out_TX[decodes.rows_N] = decode(q_THQ[decodes.rows_N], decodes).flatten(1)
    return out_TX


def _prefill_runs(prefills: Sequence[PrefillSlice]) -> list[list[PrefillSlice]]:
    """All slices in order: neighbors of equal length without context together, every other slice alone."""
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
