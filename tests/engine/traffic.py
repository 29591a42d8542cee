"""Random traffic for one engine: arrivals, texts that end early or are aborted, prompts beside texts that decode.

The same seed brings the same requests in every engine. When they arrive may differ between engines, because one that
runs ahead learns of an end one step later; a greedy text depends on neither.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from antiphon.comm import RankGroup
from antiphon.config.engine_config import EngineConfig
from antiphon.core.policy import OverlapPolicy
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.build import build_engine
from antiphon.engine.scheduling.request import Request
from antiphon.engine.step import StepEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """How much of what. end_ids: a few of them end some texts early. Requests with an odd number are never aborted."""

    seed: int
    num_requests: int
    vocab_size: int
    most_prompt: int = 24
    most_tokens: int = 30
    most_open: int = 12
    sampled: bool = True
    ends: int = 8

    def request(self, number: int) -> Request:
        dice = random.Random(f"{self.seed} {number}")
        prompt = tuple(dice.randrange(5, self.vocab_size) for _ in range(dice.randint(1, self.most_prompt)))
        params: dict[str, Any] = {}
        if self.sampled and dice.random() < 0.5:
            params = {"temperature": 0.8, "top_k": dice.choice([0, 5])}
            if dice.random() < 0.5:
                params |= {"logprobs": 2} if dice.random() < 0.3 else {"presence_penalty": 0.5}
            if dice.random() < 0.3:
                params |= {"min_tokens": 5}
        stops = tuple(dice.randrange(5, self.vocab_size) for _ in range(self.ends))
        return Request(
            request_id=number,
            prompt_ids=prompt,
            params=ResolvedParams(stop_token_ids=stops, **params),
            max_tokens=dice.randint(1, self.most_tokens),
            seed=dice.randrange(2**31),
        )


def drive(engine: StepEngine, traffic: Traffic) -> dict[int, list[int]]:
    """Run all requests. Returns the tokens of each; those of an aborted one up to some step."""
    dice = random.Random(traffic.seed)
    tokens: dict[int, list[int]] = {}
    open_requests: set[int] = set()
    started, idle = 0, False
    while started < traffic.num_requests or not idle:
        aborted = [number for number in sorted(open_requests) if number % 2 == 0 and dice.random() < 0.02]
        engine.scheduler.abort(aborted)
        open_requests -= set(aborted)
        new = []
        while started < traffic.num_requests and len(open_requests) < traffic.most_open and dice.random() < 0.6:
            new.append(traffic.request(started))
            tokens[started] = []
            open_requests.add(started)
            started += 1
        result = engine.step(new)
        idle = result.plan.idle
        for output in result.outputs:
            assert output.token is not None
            assert output.request_id in open_requests, "a token of a request that has ended"
            tokens[output.request_id].append(output.token.token_id)
            if output.finish_reason is not None:
                open_requests.discard(output.request_id)
    assert not open_requests and not engine.in_flight
    pool = engine.scheduler.pool
    assert pool.num_free == pool.num_usable and engine.scheduler.num_unfinished == 0
    return tokens


def of_engines(group: RankGroup, traffic: Traffic, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drive one engine after the other with the same traffic. arms: engine options, with `dbo` among them."""
    found = []
    for arm in arms:
        options = {"ranks": group.size, "max_model_len": 64, **arm}
        policy = OverlapPolicy(dbo=options.pop("dbo", "off"))
        engine = build_engine(EngineConfig(policy=policy, **options).resolve(), group)
        tokens = drive(engine, traffic)
        found.append({"tokens": tokens, "stats": engine.statistics()})
    return found
