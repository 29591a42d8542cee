"""Models of every architecture on several ranks, split and not, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from antiphon.comm import RankGroup
from tests.models.rank_checks import logits_of_all, text_of_rank
from tests.models.test_parity import TOLERANCE, YARN
from tests.models.twin import random_checkpoint, relative_error
from tests.support.ranks import run_ranks

CONFIGS = [
    ("deepseek-v3", {"n_group": 4, "topk_group": 2, "tie_word_embeddings": True}),
    ("deepseek-v3", {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    (
        "deepseek-v3",
        {"hidden_size": 19, "kv_lora_rank": 11, "v_head_dim": 3, "n_shared_experts": 0, "attention_bias": True},
    ),
    ("deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    ("deepseek-v2", {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    ("deepseek-v2", {"q_lora_rank": None, "first_k_dense_replace": 2, "n_shared_experts": 2, "attention_bias": True}),
    ("deepseek-v2", {"first_k_dense_replace": 0, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    ("qwen3-moe", {}),
    ("qwen3-moe", {"norm_topk_prob": False, "attention_bias": True, "num_experts_per_tok": 5}),
    ("qwen3-moe", {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": YARN, "tie_word_embeddings": True}),
    ("glm4-moe", {"use_qk_norm": True}),
    ("glm4-moe", {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "attention_bias": False}),
    ("glm4-moe", {"first_k_dense_replace": 2, "norm_topk_prob": False, "tie_word_embeddings": True}),
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 10, "rope_parameters": YARN}),
    ("mixtral", {"num_key_value_heads": 6, "num_experts_per_tok": 1, "rms_norm_eps": 0.1, "tie_word_embeddings": True}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, PreTrainedModel]]:
    made = []
    for number, (kind, changes) in enumerate(CONFIGS):
        folder = tmp_path_factory.mktemp(f"{kind}-{number}")
        made.append((folder, random_checkpoint(folder, kind=kind, seed=number, **changes)))
    return made


def test_every_architecture_on_one_rank(checkpoints: list[tuple[Path, PreTrainedModel]]) -> None:
    folders = [folder for folder, _ in checkpoints]
    assert_equal_to_theirs([logits_of_all(RankGroup(rank=0, size=1), folders, "auto")], checkpoints)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("num_ranks", "transport"),
    [
        (2, "alltoall"),
        *(
            pytest.param(ranks, name, marks=pytest.mark.slow)
            for ranks in (2, 4)
            for name in ("alltoall", "allgather", "shared-memory")
            if (ranks, name) != (2, "alltoall")
        ),
    ],
)
def test_every_architecture_on_several_ranks(
    checkpoints: list[tuple[Path, PreTrainedModel]], num_ranks: int, transport: str
) -> None:
    folders = [folder for folder, _ in checkpoints]
    by_rank = run_ranks("tests.models.rank_checks:logits_of_all", num_ranks, folders, transport)
    assert_equal_to_theirs(by_rank, checkpoints)


def assert_equal_to_theirs(
    by_rank: list[list[tuple[torch.Tensor, torch.Tensor]]], checkpoints: list[tuple[Path, PreTrainedModel]]
) -> None:
    for rank, results in enumerate(by_rank):
        ids = torch.tensor([text_of_rank(rank)])
        for (serial, dual), (_, theirs), config in zip(results, checkpoints, CONFIGS, strict=True):
            with torch.inference_mode():
                expected = theirs(ids).logits[0]
            assert relative_error(serial, expected) < TOLERANCE, (rank, config)
            assert relative_error(dual, expected) < TOLERANCE, (rank, config)
