"""What the ranks of `test_models_ranks` do; called by `tests.support.ranks.run_ranks`."""

from __future__ import annotations

from pathlib import Path

import torch

from antiphon.comm import RankGroup
from antiphon.core.batch import RequestSlice
from tests.models.twin import Twin, random_ids, scattered_blocks

__all__ = ["NUM_DECODES", "logits_of_all", "text_of_rank"]

NUM_DECODES = 3


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
    """[S, V]: a prompt in one step, or in two lanes cut at another place on each rank, then decode steps."""
    twin.empty_cache()
    ids = text_of_rank(group.rank)
    (blocks,) = scattered_blocks(1, len(ids))
    lengths = [len(text_of_rank(rank)) - NUM_DECODES for rank in range(group.size)]
    prompt = len(ids) - NUM_DECODES
    parts = tuple((5 + rank, length - 5 - rank) if dual else (length,) for rank, length in enumerate(lengths))
    logits = [twin.logits_of_parts([_slice(ids, 0, prompt, blocks)], parts)]
    for position in range(prompt, len(ids)):
        request = _slice(ids, position, position + 1, blocks)
        logits.append(twin.logits_of_parts([request], ((1,),) * group.size))
    return torch.cat(logits)


def _slice(ids: list[int], start: int, stop: int, blocks: tuple[int, ...]) -> RequestSlice:
    return RequestSlice(request_id=0, token_ids=tuple(ids[start:stop]), context_len=start, block_ids=blocks)
