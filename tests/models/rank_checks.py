"""What the ranks of `test_models_ranks` do; called by `tests.support.ranks.run_ranks`."""

from __future__ import annotations

from pathlib import Path

import torch

from antiphon.comm import RankGroup
from antiphon.core.batch import RequestSlice
from tests.models.twin import Twin, random_ids, scattered_blocks

__all__ = ["NUM_DECODES", "logits_of_all", "text_of_rank"]

NUM_DECODES = 3
FIRST_CHUNK = 6


def text_of_rank(rank: int) -> list[int]:
    """Every rank has another text, of another length."""
    return random_ids(24 - 3 * rank, seed=rank)


def logits_of_all(group: RankGroup, folders: list[Path], transport: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each checkpoint the logits of this rank's text, from unsplit and from split steps."""
    results = []
    for folder in folders:
        twin = Twin.load(None, folder, group=group, transport=transport)
        results.append((_logits(twin, group, dual=False), _logits(twin, group, dual=True)))
    return results


def _logits(twin: Twin, group: RankGroup, *, dual: bool) -> torch.Tensor:
    """[S, V]: a prompt in two chunks, then decode steps; all steps whole, or all in two lanes."""
    twin.empty_cache()
    ids = text_of_rank(group.rank)
    (blocks,) = scattered_blocks(1, len(ids))
    lengths_by_step = zip(*(_lengths(rank) for rank in range(group.size)), strict=True)
    logits, start = [], 0
    for lengths in lengths_by_step:
        parts = tuple(_lanes(length, rank) if dual else (length,) for rank, length in enumerate(lengths))
        stop = start + lengths[group.rank]
        logits.append(twin.logits_of_parts([_slice(ids, start, stop, blocks)], parts))
        start = stop
    assert start == len(ids)
    return torch.cat(logits)


def _lengths(rank: int) -> list[int]:
    """The tokens of each step: two chunks, then single tokens."""
    prompt = len(text_of_rank(rank)) - NUM_DECODES
    return [FIRST_CHUNK, prompt - FIRST_CHUNK, *[1] * NUM_DECODES]


def _lanes(length: int, rank: int) -> tuple[int, int]:
    """Each rank cuts at another place; a single token leaves a lane empty, and not the same one on all ranks."""
    first = rank % 2 if length == 1 else 1 + rank
    return (first, length - first)


def _slice(ids: list[int], start: int, stop: int, blocks: tuple[int, ...]) -> RequestSlice:
    return RequestSlice(request_id=0, token_ids=tuple(ids[start:stop]), context_len=start, block_ids=blocks)
