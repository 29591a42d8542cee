"""What the ranks of tests/engine/test_padding.py run, each in its own process."""

from __future__ import annotations

from typing import Any

from antiphon.comm import RankGroup
from antiphon.config.engine_config import EngineConfig
from antiphon.core.policy import OverlapPolicy
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.build import build_engine
from antiphon.engine.scheduling.request import Request
from antiphon.engine.step import StepEngine

LADDER = (1, 2, 4, 8, 24)


def generate(engine: StepEngine, prompts: dict[int, tuple[int, ...]], max_tokens: int) -> dict[str, Any]:
    """Steps until no rank has work; the tokens of this rank's prompts, and how each step was planned."""
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
    """Without padding, then with it, in new engines."""
    options = EngineConfig(
        model=model,
        ranks=group.size,
        device="cpu",
        transport=transport if group.size > 1 else "auto",
        policy=OverlapPolicy(dbo=dbo),
        max_model_len=64,
    )
    config = options.resolve()
    found = []
    for ladder in ((), LADDER):
        engine = build_engine(config, group)
        engine.planner.ladder = ladder
        found.append(generate(engine, prompts_by_rank[group.rank], 6))
    return found
