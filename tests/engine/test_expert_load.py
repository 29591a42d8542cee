"""The load of expert ranks is counted exactly, in every 64th step, whatever the plan."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from antiphon import LLM, SamplingParams
from antiphon.comm import Routes
from antiphon.engine.stats import ExpertLoad
from antiphon.kernels.router import PairCounts, Scoring, choose_experts, count_pairs
from antiphon.models.moe import MoELayer
from antiphon.models.router import Router, RoutingConfig
from tests.support.prompts import mixed_prompts


class FixedRouter(Router):
    """Returns the expert ids it is given."""

    def __init__(self) -> None:
        routing = RoutingConfig(scores=Scoring.SOFTMAX, num_experts=6, top_k=2, normalize=False)
        super().__init__(4, routing, dtype=torch.float32)

    def forward(self, ids_TK: torch.Tensor, num_real_1: torch.Tensor | None = None) -> Routes:
        if self.counts is not None:
            count_pairs(ids_TK, self.counts)
        return Routes(ids_TK, torch.ones(ids_TK.shape))


def test_pairs_are_counted_by_layer_and_rank_of_the_expert() -> None:
    routers = [FixedRouter(), FixedRouter()]
    model = nn.ModuleList([MoELayer(router, cast(Any, nn.Identity()), None) for router in routers])
    load = ExpertLoad(model, num_experts=6, num_ranks=3, device=torch.device("cpu"))
    ids_TK = torch.tensor([[0, 1], [1, 5], [2, 4], [5, 0]])
    for number in (0, 1, 63, 64, 65):
        with load.step(number), torch.inference_mode():
            routers[0](ids_TK)
            routers[1](torch.cat([ids_TK[:1], torch.full((3, 2), -1)]))  # three rows are padding
    routers[0](ids_TK)  # outside any step
    assert load.tokens_by_layer() == [[8, 2, 6], [4, 0, 0]]  # those of steps 0 and 64
    with pytest.raises(ValueError, match="boom"), load.step(128):
        raise ValueError("boom")
    routers[0](ids_TK)
    assert load.tokens_by_layer() == [[8, 2, 6], [4, 0, 0]]


def test_a_step_that_asks_the_switch_counts_only_while_it_is_on() -> None:
    """As a captured step does, which is the same work in every step."""
    logits_TE = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    counts = PairCounts(torch.zeros(6, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
    num_real_1 = torch.tensor([5])
    for switch in (0, 1, 0, 1):
        counts.switch_1.fill_(switch)
        ids_TK, _ = choose_experts(logits_TE, 2, Scoring.SOFTMAX, num_real_1=num_real_1, counts=counts)
    assert counts.counts_E.tolist() == (2 * torch.bincount(ids_TK[:5].flatten(), minlength=6)).tolist()


def tokens_of(llm: LLM) -> list[list[list[int]]]:
    """[source rank][layer][expert's rank]."""
    return [stats["expert_tokens"] for stats in llm._client.statistics()]


@pytest.mark.processes
def test_the_first_step_is_counted_whole_however_it_is_split() -> None:
    prompts = mixed_prompts(6)
    found = {}
    for dbo in ("off", "on"):
        with LLM(ranks=2, transport="alltoall", dbo=dbo) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=8))
            found[dbo] = tokens_of(llm)
            steps = llm.stats()["steps_by_plan"]
    assert steps["dual"] >= 1
    assert found["on"] == found["off"]
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    per_layer = [sum(map(sum, layer)) for layer in zip(*found["on"], strict=True)]
    assert per_layer == [4 * num_tokens] * 5  # four experts a token, five layers; nothing of the steps after it
