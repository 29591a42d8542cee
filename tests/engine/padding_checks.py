"""Padded steps and eager ones, on one rank or on several, for `test_padding`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from antiphon.comm import RankGroup, Rows
from antiphon.config.engine_config import EngineConfig
from antiphon.core.batch import Batch
from antiphon.core.plan import Plan
from antiphon.core.policy import OverlapPolicy
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.build import build_engine
from antiphon.engine.runner import Runner
from antiphon.engine.scheduling.request import Request
from antiphon.engine.stats import ExpertLoad
from antiphon.engine.step import StepEngine
from antiphon.models.moe import Experts
from antiphon.splitting import join, split
from tests.engine.layer_checks import mixed_requests, write_contexts
from tests.models.twin import BLOCK_SIZE, Twin

LADDER = (1, 2, 4, 8, 24)


def generate(engine: StepEngine, prompts: dict[int, tuple[int, ...]], max_tokens: int) -> dict[str, Any]:
    """Step until no rank has work. Returns the tokens of this rank's prompts, and how each step was planned."""
    requests = [
        Request(request_id=number, prompt_ids=ids, params=ResolvedParams(), max_tokens=max_tokens + number % 3, seed=0)
        for number, ids in prompts.items()
    ]
    tokens: dict[int, list[int]] = {number: [] for number in prompts}
    plans = []
    result = engine.step(requests)
    while not result.plan.idle:
        plans.append((result.plan.kind, result.plan.graph, result.plan.part_tokens))
        for output in result.outputs:
            assert output.token is not None
            tokens[output.request_id].append(output.token.token_id)
        result = engine.step()
    experts = engine.statistics()["expert_tokens"]
    return {"tokens": tokens, "plans": plans, "expert_tokens": experts}


def padded_and_not(
    group: RankGroup, model: str, transport: str, dbo: str, prompts_by_rank: list[dict[int, tuple[int, ...]]]
) -> list[dict[str, Any]]:
    """Generate without padding, then with it, in new engines."""
    found = []
    for sizes in (None, ",".join(map(str, LADDER))):
        options = EngineConfig(
            model=model,
            ranks=group.size,
            device="cpu",
            transport=transport if group.size > 1 else "auto",
            policy=OverlapPolicy(dbo=dbo),
            max_model_len=64,
            cuda_graph_sizes=sizes,
        )
        engine = build_engine(options.resolve(), group)
        found.append(generate(engine, prompts_by_rank[group.rank], 6))
    return found


ONE_RANK = [((19,),), ((9, 10),), ((0, 19),), ((3, 9, 7),)]
TWO_RANKS = [((19,), (19,)), ((9, 10), (4, 15)), ((19, 0), (0, 0)), ((3, 9, 7), (18, 0, 1))]
SIZES = (19, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The results of one step. cache: all blocks but block 0. num_pairs: those that this rank computed."""

    hidden_TD: torch.Tensor
    cache: torch.Tensor
    num_pairs: int
    expert_load: list[list[int]]


def outcomes_of_rank(
    group: RankGroup, folder: Path, transport: str, cases: list[tuple[tuple[int, ...], ...]]
) -> list[list[Outcome]]:
    """Run for each plan the eager step, then the padded one of every size."""
    twin = Twin.load(None, folder, group=group, transport=transport, dtype=torch.float64)
    layers = list(twin.ours.decoder_layers())
    mixed = mixed_requests(seed=10 * group.rank)
    write_contexts(twin, group.size, seed=10 * group.rank)
    before = [layer.self_attn.cache_blocks.clone() for layer in layers]
    outcomes = []
    for part_tokens in cases:
        batch = Batch(rank=group.rank, requests=mixed if sum(part_tokens[group.rank]) else ())
        of_case = []
        for size in (0, *SIZES):
            for layer, cache in zip(layers, before, strict=True):
                layer.self_attn.cache_blocks.copy_(cache)
            of_case.append(run(twin, batch, Plan(part_tokens=part_tokens, reason="test", graph=size), group.size))
        outcomes.append(of_case)
    return outcomes


def outcomes_of_jobs(group: RankGroup, jobs: list[tuple[Path, str]]) -> list[list[list[Outcome]]]:
    """Run `outcomes_of_rank` for all jobs in one start of the ranks."""
    return [outcomes_of_rank(group, folder, transport, TWO_RANKS) for folder, transport in jobs]


def run(twin: Twin, batch: Batch, plan: Plan, num_ranks: int) -> Outcome:
    """Run one step. Every rank must call it."""
    config, num_pairs, compute = twin.ours.config, 0, Experts.compute

    def counting(experts: Experts, rows: Rows) -> torch.Tensor:
        nonlocal num_pairs
        num_pairs += int((rows.ids_RK >= 0).sum())
        return compute(experts, rows)

    load = ExpertLoad(twin.ours, num_experts=config.num_experts, num_ranks=num_ranks, device=torch.device("cpu"))
    patched: Any = Experts
    patched.compute = counting
    try:
        with load.step(0):
            parts = split(batch, plan, block_size=BLOCK_SIZE)
            hidden = Runner(twin.ours, streams=twin.streams).run(parts)
    finally:
        patched.compute = compute
    assert not plan.graph or {part.token_ids_T.shape[0] for part in parts} == {plan.graph}
    caches = torch.stack([layer.self_attn.cache_blocks[1:] for layer in twin.ours.decoder_layers()])
    return Outcome(
        hidden_TD=join(hidden),
        cache=caches.nan_to_num(7.0),
        num_pairs=num_pairs,
        expert_load=load.tokens_by_layer(),
    )
