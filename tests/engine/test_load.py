"""Many requests with a KV cache that holds a tenth of them: every text equals that of the request alone on one rank.

100 requests are run by default, 500 by `make test-slow`.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import pytest
import torch

from antiphon import LLM, SamplingParams
from antiphon.config.cache import block_bytes
from antiphon.core.bundled import bundled_model
from antiphon.frontend.tokenizer import Tokenizer
from antiphon.models import read_config
from tests.support.prompts import mixed_prompts

pytestmark = pytest.mark.processes

BLOCK_SIZE = 4
NUM_REQUESTS = [100, pytest.param(500, marks=pytest.mark.slow)]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "forced": [{"dbo": "off"}, {"dbo": "on", "split": "token"}, {"dbo": "on", "split": "request-boundary"}],
    "auto": [{"dbo": "auto", "split": "token"}],
}
THRESHOLDS = {"dbo_prefill_token_threshold": 64, "dbo_decode_token_threshold": 12}


@lru_cache(maxsize=2)
def load(num_requests: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Make prompts of 3 to about 200 tokens, many with common prefixes, and outputs of 1 to 3 tokens.

    Some outputs have 40 to 59 tokens, which outgrow what was free when they were admitted. A quarter is drawn.
    """
    numbers = random.Random(7)
    tokenizer = Tokenizer(str(bundled_model()))
    texts = [tokenizer.encode(text) for text in mixed_prompts(40)]
    prompts, params = [], []
    for number in range(num_requests):
        ids = [token for text in numbers.choices(texts, k=numbers.choice([1, 1, 2, 3])) for token in text]
        prompts.append(ids[: numbers.randrange(3, len(ids) + 1)])
        drawn: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "seed": number} if number % 4 == 0 else {}
        most = numbers.randrange(40, 60) if number % 7 == 0 else numbers.randrange(1, 4)
        params.append(SamplingParams(max_tokens=most, ignore_eos=bool(number % 3), **drawn))
    return prompts, params


@lru_cache(maxsize=2)
def texts_alone(num_requests: int) -> list[list[int]]:
    """Run each request by itself on one rank: one at a time, and without the prefix cache."""
    prompts, params = load(num_requests)
    with LLM(max_num_seqs=1, prefix_caching=False, dtype="float32") as llm:
        outputs = llm.generate(prompts, params)
        stats = llm.stats()
        assert stats["steps"] == sum(len(output.token_ids) for output in outputs)
        assert stats["preemptions"] == stats["prefix_cache"]["hit_tokens"] == 0
    return [output.token_ids for output in outputs]


def bytes_for_a_tenth(num_requests: int, ranks: int) -> int:
    """The bytes per rank with which all ranks together hold a tenth of all tokens, with one block for padding."""
    prompts, params = load(num_requests)
    num_tokens = sum(len(ids) + param.max_tokens for ids, param in zip(prompts, params, strict=True))
    num_blocks = 1 + num_tokens // 10 // ranks // BLOCK_SIZE
    return num_blocks * block_bytes(read_config(bundled_model()), block_size=BLOCK_SIZE, dtype=torch.float32)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_requests", NUM_REQUESTS)
@pytest.mark.parametrize("settings", ["forced", pytest.param("auto", marks=pytest.mark.slow)])
def test_every_text_is_that_of_the_request_alone(settings: str, num_requests: int) -> None:
    prompts, params = load(num_requests)
    expected = texts_alone(num_requests)
    with LLM(
        ranks=2,
        dtype="float32",
        block_size=BLOCK_SIZE,
        kv_cache_memory=bytes_for_a_tenth(num_requests, 2),
        max_num_batched_tokens=128,
        max_model_len=256,
        **(THRESHOLDS if settings == "auto" else {}),
    ) as llm:
        for setting in SETTINGS[settings]:
            llm.reconfigure(**setting)
            before = llm.stats()
            outputs = llm.generate(prompts, params)
            _check(setting, [output.token_ids for output in outputs], expected, before, llm.stats())


def _check(
    setting: dict[str, Any],
    texts: list[list[int]],
    expected: list[list[int]],
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    assert [number for number, (ids, alone) in enumerate(zip(texts, expected, strict=True)) if ids != alone] == []
    num_preemptions = after["preemptions"] - before["preemptions"]
    num_found = after["prefix_cache"]["hit_tokens"] - before["prefix_cache"]["hit_tokens"]
    assert num_preemptions > 0 and num_found > 0
    assert (after["unfinished"], after["running"]) == (0, 0)
    assert after["kv_blocks"]["free"] == after["kv_blocks"]["total"], "a block was lost"
    num_steps = after["steps"] - before["steps"]
    num_dual = after["steps_by_plan"].get("dual", 0) - before["steps_by_plan"].get("dual", 0)
    print(f"{setting}: {num_steps} steps, {num_dual} dual; {num_preemptions} preemptions, {num_found} tokens found")
    if setting["dbo"] == "off":
        assert num_dual == 0
    elif setting == {"dbo": "on", "split": "token"}:
        assert num_dual > 0.8 * num_steps  # at the end a rank may have a single token left, which cannot be cut
    else:
        assert 0 < num_dual < num_steps
