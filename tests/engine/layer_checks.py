"""Steps in which only some layers are split, on one rank or on several, for `test_layers`."""

from __future__ import annotations

from pathlib import Path

import torch

from antiphon.comm import RankGroup
from antiphon.core.batch import Batch, RequestSlice
from antiphon.core.plan import Plan
from antiphon.engine.runner import Runner
from antiphon.splitting import join, split
from tests.models.twin import BLOCK_SIZE, Twin, random_ids, scattered_blocks

NUM_LAYERS = 4
RANGES = [slice(None), slice(1, None), slice(0, 1), slice(1, 3), slice(2, 3), slice(3, 4), slice(0, 3)]

# Tokens of every lane on every rank: requests across a cut, another cut on each rank, a dummy lane, an idle rank.
PARTS = [((9, 10), (4, 15)), ((1, 18), (19, 0)), ((12, 7), (0, 0)), ((3, 9, 7), (18, 0, 1))]

_TEXTS = [(12, 13), (4, 12), (29, 30), (0, 9)]  # context, and end of the new tokens


def mixed_requests(*, seed: int) -> tuple[RequestSlice, ...]:
    """Two requests that decode, one that continues its prompt, and one that begins: 19 tokens in all."""
    blocks = scattered_blocks(len(_TEXTS), 30)
    texts = [random_ids(30, seed=seed + number) for number in range(len(_TEXTS))]
    return tuple(
        RequestSlice(request_id=number, token_ids=tuple(ids[start:stop]), context_len=start, block_ids=own)
        for number, (ids, (start, stop), own) in enumerate(zip(texts, _TEXTS, blocks, strict=True))
    )


def run_step(
    twin: Twin, requests: tuple[RequestSlice, ...], part_tokens: tuple[tuple[int, ...], ...], layers: slice
) -> torch.Tensor:
    """Return the hidden states [T, D] of this rank. Every rank must call it."""
    plan, batch = Plan(part_tokens=part_tokens, reason="test"), Batch(rank=twin.rank, requests=requests)
    runner = Runner(twin.ours, streams=twin.streams)
    (whole,) = split(batch, plan.unsplit(), block_size=BLOCK_SIZE)
    return join(runner.run(split(batch, plan, block_size=BLOCK_SIZE), whole=whole, layers=layers))


Results = list[list[tuple[torch.Tensor, torch.Tensor]]]


def results_of_jobs(group: RankGroup, jobs: list[tuple[Path, str, torch.dtype]]) -> list[Results]:
    """Run `results_of_rank` for each folder, transport and dtype: one start of the ranks serves many checks."""
    return [results_of_rank(group, *job, PARTS) for job in jobs]


def results_of_rank(
    group: RankGroup, folder: Path, transport: str, dtype: torch.dtype, cases: list[tuple[tuple[int, ...], ...]]
) -> Results:
    """Return hidden states and caches for each plan in `cases`: of the unsplit step, then of every range."""
    twin = Twin.load(None, folder, group=group, transport=transport, dtype=dtype)
    mixed = mixed_requests(seed=10 * group.rank)
    write_contexts(twin, group.size, seed=10 * group.rank)
    before = [layer.self_attn.cache_blocks.clone() for layer in twin.ours.decoder_layers()]
    results = []
    for part_tokens in cases:
        serial = tuple((sum(parts),) for parts in part_tokens)
        requests = mixed if serial[group.rank][0] else ()
        of_case = []
        for plan, layers in [(serial, slice(None)), *((part_tokens, layers) for layers in RANGES)]:
            for layer, cache in zip(twin.ours.decoder_layers(), before, strict=True):
                layer.self_attn.cache_blocks.copy_(cache)
            hidden_TD = run_step(twin, requests, plan, layers)
            after = torch.stack([layer.self_attn.cache_blocks for layer in twin.ours.decoder_layers()])
            of_case.append((hidden_TD, after.nan_to_num(7.0)))
        results.append(of_case)
    return results


def write_contexts(twin: Twin, num_ranks: int, *, seed: int) -> None:
    """Compute the contexts of the requests of `mixed_requests`. Every rank must call it."""
    for number, ((context, _), blocks) in enumerate(zip(_TEXTS, scattered_blocks(len(_TEXTS), 30), strict=True)):
        if context:
            ids = random_ids(30, seed=seed + number)[:context]
            request = RequestSlice(request_id=number, token_ids=tuple(ids), context_len=0, block_ids=blocks)
            run_step(twin, (request,), ((context,),) * num_ranks, slice(None))
