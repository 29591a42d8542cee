"""Overlap of the engine on two GPUs: what `auto` chooses there, its gain, and what the statistics leave out."""

from __future__ import annotations

import random

import pytest
import torch

from antiphon import LLM
from antiphon.config.describe import describe_config
from tests.support.overlap import ONE_TOKEN, engine_ratio, until_met

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(400),
]

BY_PEERS = "off: peer access is in use, where overlap has not paid"
THROUGH_HOST = (
    "from 4096 tokens per rank in prefill and 4096 in decode: data goes through host memory, where overlap has paid"
)


def prompts_of(num_prompts: int, length: int) -> list[list[int]]:
    numbers = random.Random(2)
    return [[numbers.randrange(1000, 2000) for _ in range(length)] for _ in range(num_prompts)]


@pytest.mark.parametrize(
    ("transport", "peer_access", "reason"),
    [
        ("auto", True, BY_PEERS),
        ("allgather", True, BY_PEERS),
        ("alltoall", True, BY_PEERS),
        ("host-staged", True, THROUGH_HOST),
        ("auto", False, THROUGH_HOST),
        ("alltoall", False, THROUGH_HOST),
    ],
)
def test_auto_follows_the_data_path(transport: str, peer_access: bool, reason: str) -> None:
    """On cards that reach each other, as those with NVLink do. All ranks have the same policy, or a step would fail."""
    with LLM(ranks=2, device="cuda", transport=transport, peer_access=peer_access, prefix_caching=False) as llm:
        assert llm.stats()["dbo_reason"] == reason
        block = dict(describe_config(llm.config))["dbo"]
        assert reason.removeprefix("off: ") in block
        llm.generate(prompts_of(8, 1000), ONE_TOKEN)  # 4,000 tokens per rank
        llm.generate(prompts_of(8, 1024), ONE_TOKEN)  # 4,096
        assert llm.stats()["steps_by_plan"] == (
            {"serial": 2, "dual": 0} if reason is BY_PEERS else {"serial": 1, "dual": 1}
        )
        for sums in llm.stats()["overlap"].values():  # the host does not see when data arrives
            assert sums["num_bytes"] > 0 and sums["time_s"] > 0
            assert sums["communication_s"] is sums["exposed_s"] is sums["hidden_s"] is None


def test_without_peer_access_steps_that_auto_splits_are_faster() -> None:
    """Whole engine, 8,192 tokens a step: 0.69 of serial with all 48 layers."""
    with LLM(
        "qwen3-30b-a3b",
        load_format="dummy",
        routing="uniform",
        num_layers=16,
        ranks=2,
        device="cuda",
        peer_access=False,
        prefix_caching=False,
        max_num_batched_tokens=8192,
        max_model_len=8192,
    ) as llm:
        assert str(llm.config.transport) == "host-staged"
        prompts = prompts_of(32, 2048)  # 4 steps on each rank

        def unmet() -> list[str]:
            ratio = engine_ratio(llm, prompts, modes=("off", "auto"), repeats=5)
            return [f"auto takes {ratio:.2f} of off"] if ratio > 0.9 else []

        assert until_met(unmet, trials=2) == []
        steps = llm.stats()["steps_by_plan"]
        assert steps["dual"] == steps["serial"]
