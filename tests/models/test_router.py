"""Routers alone against those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from antiphon.comm import Routes
from antiphon.kernels.router import Scoring
from antiphon.models.router import Router, RoutingConfig
from tests.models.twin import tiny_config

NUM_TOKENS = 200

CASES: dict[str, dict[str, Any]] = {
    "one-group": {"n_group": 1, "topk_group": 1},
    "all-groups": {"n_group": 4, "topk_group": 4},
    "two-of-four-groups": {"n_group": 4, "topk_group": 2},
    "one-of-four-groups": {"n_group": 4, "topk_group": 1},
    "pairs": {"n_group": 6, "topk_group": 2},
    "raw-weights": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    "one-expert": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 1},
}


def make_pair(bias_size: float, **changes: Any) -> tuple[DeepseekV3TopkRouter, Router]:
    config = tiny_config(**changes)
    generator = torch.Generator().manual_seed(9)
    theirs = DeepseekV3TopkRouter(config)
    routing = RoutingConfig(
        scores=Scoring.SIGMOID,
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        normalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )
    ours = Router(config.hidden_size, routing, dtype=torch.float32)
    weight = torch.randn(theirs.weight.shape, generator=generator) * 0.3
    bias = torch.randn(config.n_routed_experts, generator=generator) * bias_size
    for router in (theirs, ours):
        router.weight.data.copy_(weight)
        router.e_score_correction_bias.copy_(bias)
    return theirs, ours


def make_tokens(hidden_size: int) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, hidden_size, generator=torch.Generator().manual_seed(10))


def dense(ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Weights [T, E], zero where an expert is not chosen: the order of the experts does not matter."""
    return torch.zeros(len(ids_TK), num_experts, dtype=weights_TK.dtype).scatter(1, ids_TK, weights_TK)


def chosen(ids_TK: torch.Tensor) -> list[set[int]]:
    return [set(ids) for ids in ids_TK.tolist()]


@pytest.mark.parametrize("bias_size", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_same_experts_and_weights(case: str, bias_size: float) -> None:
    theirs, ours = make_pair(bias_size, **CASES[case])
    x_TD = make_tokens(theirs.hidden_dim)
    _, their_weights, their_ids = theirs(x_TD)
    routes: Routes = ours(x_TD)
    assert routes.ids_TK.shape == their_ids.shape
    assert routes.ids_TK.dtype == torch.int64
    assert routes.weights_TK.dtype == torch.float32
    assert chosen(routes.ids_TK) == chosen(their_ids)
    torch.testing.assert_close(
        dense(routes.ids_TK, routes.weights_TK, theirs.num_experts),
        dense(their_ids, their_weights, theirs.num_experts),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_the_correction_bias_chooses_but_does_not_weigh(case: str) -> None:
    _, plain = make_pair(0.0, **CASES[case])
    _, corrected = make_pair(0.2, **CASES[case])
    x_TD = make_tokens(24)
    before, after = plain(x_TD), corrected(x_TD)
    assert chosen(before.ids_TK) != chosen(after.ids_TK)
    scores_TK = (x_TD @ corrected.weight.t()).sigmoid().gather(1, after.ids_TK)
    if corrected.config.normalize:
        scores_TK = scores_TK / scores_TK.sum(1, keepdim=True)
    torch.testing.assert_close(after.weights_TK, scores_TK * 1.7, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_the_group_limit_holds() -> None:
    _, ours = make_pair(0.2, n_group=4, topk_group=2, num_experts_per_tok=5)
    groups = [{expert // 3 for expert in experts} for experts in chosen(ours(make_tokens(24)).ids_TK)]
    assert max(map(len, groups)) == 2
    _, free = make_pair(0.2, n_group=4, topk_group=4, num_experts_per_tok=5)
    groups = [{expert // 3 for expert in experts} for experts in chosen(free(make_tokens(24)).ids_TK)]
    assert max(map(len, groups)) > 2


@torch.inference_mode()
def test_scores_are_computed_in_float32_for_a_bfloat16_model() -> None:
    _, wide = make_pair(0.2, n_group=4, topk_group=2)
    narrow = Router(24, wide.config, dtype=torch.bfloat16)
    narrow.weight.data.copy_(wide.weight)
    wide.weight.data.copy_(narrow.weight)
    for router in (wide, narrow):
        router.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 12))
    x_TD = make_tokens(24).to(torch.bfloat16)
    expected, routes = wide(x_TD.float()), narrow(x_TD)
    assert routes.weights_TK.dtype == torch.float32
    assert torch.equal(routes.ids_TK, expected.ids_TK)
    assert torch.equal(routes.weights_TK, expected.weights_TK)


def test_no_tokens() -> None:
    _, ours = make_pair(0.2, n_group=4, topk_group=2)
    routes = ours(torch.empty(0, 24))
    assert routes.ids_TK.shape == routes.weights_TK.shape == (0, 3)


# ---- softmax


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (4, 2), (4, 1), (12, 5), (4, 4)])
@torch.inference_mode()
def test_softmax_in_groups(num_groups: int, top_groups: int) -> None:
    """As DeepSeek-V2: a group is as good as its best expert, and weights are not normalized."""
    changes = {"topk_method": "group_limited_greedy", "n_group": num_groups, "topk_group": top_groups}
    theirs = DeepseekV2TopkRouter(tiny_config("deepseek-v2", **changes))
    routing = RoutingConfig(
        scores=Scoring.SOFTMAX,
        num_experts=12,
        top_k=3,
        num_groups=num_groups,
        top_groups=top_groups,
        normalize=False,
        scale=1.7,
    )
    assert_alike(theirs, Router(24, routing, dtype=torch.float32))


@pytest.mark.parametrize("normalize", [False, True])
@torch.inference_mode()
def test_softmax(normalize: bool) -> None:
    theirs = Qwen3MoeTopKRouter(tiny_config("qwen3-moe", norm_topk_prob=normalize))
    routing = RoutingConfig(scores=Scoring.SOFTMAX, num_experts=12, top_k=3, normalize=normalize, narrow=True)
    assert_alike(theirs, Router(24, routing, dtype=torch.float32))


@pytest.mark.parametrize("narrow", [False, True])
@torch.inference_mode()
def test_where_a_bfloat16_model_rounds(narrow: bool) -> None:
    """Qwen3 rounds its logits as it was trained; DeepSeek-V2 does not."""
    routing = RoutingConfig(scores=Scoring.SOFTMAX, num_experts=12, top_k=12, normalize=False, narrow=narrow)
    router = Router(24, routing, dtype=torch.bfloat16)
    router.weight.data.copy_(torch.randn(12, 24, generator=torch.Generator().manual_seed(1)))
    x_TD = make_tokens(24).to(torch.bfloat16)
    wide_TE = x_TD.float() @ router.weight.float().t()
    rounded_TE = (x_TD @ router.weight.t()).float()
    routes = router(x_TD)
    assert routes.weights_TK.dtype == torch.float32
    actual_TE = dense(routes.ids_TK, routes.weights_TK, 12)
    expected_TE, other_TE = (rounded_TE, wide_TE) if narrow else (wide_TE, rounded_TE)
    torch.testing.assert_close(actual_TE, expected_TE.softmax(-1), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(actual_TE, other_TE.softmax(-1), rtol=1e-4, atol=1e-6)


def assert_alike(theirs: torch.nn.Module, ours: Router) -> None:
    weight = torch.randn(12, 24, generator=torch.Generator().manual_seed(2)) * 0.3
    theirs.weight.data.copy_(weight)
    ours.weight.data.copy_(weight)
    x_TD = make_tokens(24)
    _, their_weights, their_ids = theirs(x_TD)
    routes = ours(x_TD)
    assert chosen(routes.ids_TK) == chosen(their_ids)
    torch.testing.assert_close(
        dense(routes.ids_TK, routes.weights_TK, 12), dense(their_ids, their_weights, 12), rtol=1e-5, atol=1e-6
    )
