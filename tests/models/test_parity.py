"""Models of every architecture against transformers: prefill, decode from the paged cache, chunks, cuts into lanes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from antiphon.core.batch import RequestSlice
from tests.models.twin import Twin, random_checkpoint, random_ids, relative_error, scattered_blocks

TOLERANCE = 1e-4
NUM_TOKENS = 30

YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}

DEEPSEEK_V3: dict[str, dict[str, Any]] = {
    "plain": {},
    "sizes-of-16-bytes": {"hidden_size": 32, "moe_intermediate_size": 16, "kv_lora_rank": 16, "vocab_size": 64},
    "odd-sizes": {
        "hidden_size": 19,
        "intermediate_size": 33,
        "moe_intermediate_size": 13,
        "kv_lora_rank": 11,
        "q_lora_rank": 7,
        "qk_nope_head_dim": 5,
        "v_head_dim": 3,
        "n_shared_experts": 2,
    },
    "no-query-bottleneck": {"q_lora_rank": None, "first_k_dense_replace": 0},
    "no-query-bottleneck-bias": {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2},
    "attention-bias": {"attention_bias": True, "first_k_dense_replace": 2},
    "groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "tie_word_embeddings": True},
    "one-of-three-groups": {"n_group": 3, "topk_group": 1, "num_experts_per_tok": 4, "norm_topk_prob": False},
    "all-groups": {"n_group": 3, "topk_group": 3},
    "all-dense": {"first_k_dense_replace": 3},
    "no-shared-experts": {"n_shared_experts": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "rope-in-halves": {"rope_interleave": False, "tie_word_embeddings": True},
    "large-eps": {"rms_norm_eps": 0.1, "first_k_dense_replace": 0},
    "one-expert": {"num_experts_per_tok": 1, "qk_rope_head_dim": 2},
    "all-experts": {"n_routed_experts": 4, "num_experts_per_tok": 4},
    "yarn": {"rope_parameters": YARN},
    "yarn-both-mscales": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.6}, "rope_interleave": False},
    "yarn-equal-mscales": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn-mscale": {"rope_parameters": YARN | {"mscale": 0.6}},
    "yarn-mscale-all-dim": {"rope_parameters": YARN | {"mscale_all_dim": 0.6}},
    "yarn-attention-factor": {"rope_parameters": YARN | {"attention_factor": 0.8, "mscale_all_dim": 0.6}},
    "yarn-default-betas": {"rope_parameters": {k: v for k, v in YARN.items() if "beta" not in k}},
}


DEEPSEEK_V2: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-query-bottleneck": {"q_lora_rank": None, "first_k_dense_replace": 0},
    "no-query-bottleneck-bias": {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2},
    "attention-bias": {"attention_bias": True},
    "groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "one-of-three-groups": {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1},
    "greedy-passes-over-groups": {"n_group": 4, "topk_group": 1},
    "yarn": {"rope_parameters": YARN, "q_lora_rank": None},
    "yarn-equal-mscales": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
}

QWEN3_MOE: dict[str, dict[str, Any]] = {
    "plain": {},
    "raw-weights": {"norm_topk_prob": False},
    "attention-bias": {"attention_bias": True, "tie_word_embeddings": True},
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 16},
    "as-many-kv-heads": {"num_key_value_heads": 6, "num_experts_per_tok": 1},
    "large-eps": {"rms_norm_eps": 0.1},
    "yarn": {"rope_parameters": YARN},
}

GLM4_MOE: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk-norm": {"use_qk_norm": True},
    "no-bias": {"attention_bias": False, "first_k_dense_replace": 0, "tie_word_embeddings": True},
    "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "n_shared_experts": 2},
    "all-rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
    "a-sixth-rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 1 / 6}},
    "two-dense-layers": {"first_k_dense_replace": 2, "use_qk_norm": True},
}

MIXTRAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "two-experts": {"num_local_experts": 2},
    "one-expert": {"num_experts_per_tok": 1},
    "all-experts": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "head-size": {"head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "as-many-kv-heads": {"num_key_value_heads": 6, "rms_norm_eps": 0.1},
    "odd-sizes": {"hidden_size": 30, "intermediate_size": 13, "num_attention_heads": 3, "num_key_value_heads": 3},
    "window-that-hides-nothing": {"sliding_window": 128},
    "yarn": {"rope_parameters": YARN, "head_dim": 10},  # transformers 5.23 fails at yarn without a head_dim
}

CASES = {
    f"{kind}-{name}": (kind, changes)
    for kind, cases in {
        "deepseek-v3": DEEPSEEK_V3,
        "deepseek-v2": DEEPSEEK_V2,
        "qwen3-moe": QWEN3_MOE,
        "glm4-moe": GLM4_MOE,
        "mixtral": MIXTRAL,
    }.items()
    for name, changes in cases.items()
}


@pytest.fixture(scope="module", params=CASES)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    folder = tmp_path_factory.mktemp("checkpoint")
    kind, changes = CASES[request.param]
    return Twin.load(random_checkpoint(folder, kind=kind, **changes), folder)


@pytest.fixture(autouse=True)
def nan_in_the_cache(twin: Twin) -> None:
    twin.empty_cache()


def slow(*cuts: tuple[int, ...]) -> list[Any]:
    """For `make test-slow`; test_models_straddling tries every cut of a small batch."""
    return [pytest.param(one, marks=pytest.mark.slow) for one in cuts]


def part_of(ids: list[int], start: int, stop: int, blocks: tuple[int, ...], request_id: int = 0) -> RequestSlice:
    return RequestSlice(request_id=request_id, token_ids=tuple(ids[start:stop]), context_len=start, block_ids=blocks)


@pytest.mark.parametrize("cuts", [(), (15,), *slow((1,), (29,), (10, 20), (3, 4)), (1, 29)], ids=str)
def test_prefill(twin: Twin, cuts: tuple[int, ...]) -> None:
    ids = random_ids(NUM_TOKENS, seed=5)
    (blocks,) = scattered_blocks(1, NUM_TOKENS)
    logits = twin.our_logits([part_of(ids, 0, NUM_TOKENS, blocks)], cuts)
    assert logits.dtype == torch.float32
    assert relative_error(logits, twin.their_logits(ids)) < TOLERANCE


@pytest.mark.parametrize("cuts", [(), (13,)], ids=str)
def test_decode_goes_on_from_the_cache(twin: Twin, cuts: tuple[int, ...]) -> None:
    ids = random_ids(NUM_TOKENS, seed=6)
    (blocks,) = scattered_blocks(1, NUM_TOKENS)
    expected = twin.their_logits(ids)
    twin.our_logits([part_of(ids, 0, 26, blocks)], cuts)
    for position in range(26, NUM_TOKENS):
        logits = twin.our_logits([part_of(ids, position, position + 1, blocks)])
        assert relative_error(logits[0], expected[position]) < TOLERANCE, position


def test_a_prompt_in_chunks(twin: Twin) -> None:
    ids = random_ids(NUM_TOKENS, seed=7)
    (blocks,) = scattered_blocks(1, NUM_TOKENS)
    chunks = [twin.our_logits([part_of(ids, start, stop, blocks)]) for start, stop in pairwise([0, 7, 8, 21, 30])]
    assert relative_error(torch.cat(chunks), twin.their_logits(ids)) < TOLERANCE


@pytest.mark.parametrize("cuts", [(), (11,), *slow((2,), (17,), (1, 2)), (9, 18)], ids=str)
def test_a_mixed_batch(twin: Twin, cuts: tuple[int, ...]) -> None:
    """Two requests decode, one goes on with its prompt, one begins; the cuts fall between and inside of them."""
    texts = [random_ids(NUM_TOKENS, seed=seed) for seed in range(4)]
    spans = [(12, 13), (4, 12), (29, 30), (0, 9)]
    blocks = list(scattered_blocks(4, NUM_TOKENS))
    for ids, (start, _), own in zip(texts, spans, blocks, strict=True):
        if start:
            twin.our_logits([part_of(ids, 0, start, own)])
    requests = [
        part_of(ids, start, stop, own, number)
        for number, (ids, (start, stop), own) in enumerate(zip(texts, spans, blocks, strict=True))
    ]
    expected = [twin.their_logits(ids[:stop])[start:] for ids, (start, stop) in zip(texts, spans, strict=True)]
    assert relative_error(twin.our_logits(requests, cuts), torch.cat(expected)) < TOLERANCE


@pytest.mark.parametrize("cuts", [(), (14,), *slow((10,), (25,)), (9, 21)], ids=str)
def test_prompts_of_the_same_length(twin: Twin, cuts: tuple[int, ...]) -> None:
    """They may share one call of attention, but not with a request that a cut has shortened."""
    texts = [random_ids(10, seed=seed) for seed in range(3)]
    requests = [
        part_of(ids, 0, 10, own, number)
        for number, (ids, own) in enumerate(zip(texts, scattered_blocks(3, 10), strict=True))
    ]
    expected = torch.cat([twin.their_logits(ids) for ids in texts])
    assert relative_error(twin.our_logits(requests, cuts), expected) < TOLERANCE
