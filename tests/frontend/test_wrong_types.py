"""Wrong types and values passed to the offline API raise an `AntiphonError` of one line, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antiphon import LLM, SamplingParams
from antiphon.config.options import OPTIONS
from antiphon.core.errors import AntiphonError

TEXT, COUNT, NUMBER, FLAG = [5, b"x", ["a"], object()], ["x", 0, -1, 2.5], ["x", [1], float("nan")], ["no", 1, []]
WRONG: dict[str, list[Any]] = {
    "model": [*TEXT, None, "", Path("/nowhere")],
    "revision": [],  # has no effect on a folder, which is warned of
    "load_format": [*TEXT, None],
    "num_layers": [*COUNT, 10**9],
    "routing": [*TEXT, None, "zipf:x", "recorded:/nowhere"],
    "ranks": [*COUNT, None, True, 10**9],
    "device": [5, object(), "cuda:0"],
    "dbo": [*TEXT, None, True],
    "transport": [*TEXT, None, "", "a:b:c", "simulated:alltoall:fast"],
    "peer_access": [*FLAG, None],
    "dtype": [5, None, torch.float16, "fp8"],
    "split": [*TEXT, None],
    "micro_batches": [*COUNT, None, 99],
    "dbo_prefill_token_threshold": ["x", -1, 2.5],
    "dbo_decode_token_threshold": ["x", -1, 2.5],
    "imbalance_ratio": [*NUMBER, None, 2],
    "min_total_tokens_to_split": ["x", -1, None],
    "min_prefill_tokens_to_split": ["x", -1, None],
    "dbo_start_layer": ["x", -1, None, 99],
    "dbo_end_layer": ["x", 0, 99],
    "attention_backend": [*TEXT, None, "flash-attn"],
    "max_num_batched_tokens": COUNT,
    "max_num_seqs": [*COUNT, None],
    "max_model_len": [*COUNT, 10**10],
    "block_size": [*COUNT, None],
    "kv_cache_memory": [*COUNT, 1],
    "gpu_memory_utilization": [*NUMBER, None, 0, 2],
    "prefix_caching": [*FLAG, None],
    "chunked_prefill": [*FLAG, None],
    "seed": ["x", -1, None, 2**70, 0.5],
    "timeout_s": [*NUMBER, None, 0, float("inf")],
    "on_start": ["x", 5],
    "launcher": ["x", 5],
}
WRONG = {name: [object()] for name, one in OPTIONS.items() if one.check} | WRONG  # new options need no entry


def name_of(value: Any) -> str:
    """Name a value without addresses, so that the name is the same in every process."""
    shown = repr(value)
    return type(value).__name__ if " at 0x" in shown else shown[:30]


def assert_refused(error: pytest.ExceptionInfo[AntiphonError]) -> None:
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value) and len(str(error.value)) > 20


def test_every_option_is_tried() -> None:
    assert {name for name, one in OPTIONS.items() if one.check} <= {*WRONG} <= {*OPTIONS, "on_start", "launcher"}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=name_of
)
def test_an_option_of_a_wrong_type_or_value(name: str, value: Any) -> None:
    with pytest.raises(AntiphonError) as refused:
        LLM(**{name: value})
    assert_refused(refused)


PROMPTS: list[Any] = [
    *(None, 5, b"x", {"a"}, iter(["a"]), [None], [5.0], [[]], np.array([5]), ["a", None]),
    *("\ud800", [[5, -1]], [[10**30]], [True, False], {"prompt": [5]}, {"prompt_token_ids": "a"}),
    *({}, {"text": "a"}, {"prompt": "a", "prompt_token_ids": [5]}, [{"prompt": None}]),
]


@pytest.mark.parametrize("prompts", PROMPTS, ids=name_of)
def test_wrong_prompts_are_refused(one_rank: LLM, prompts: Any) -> None:
    with pytest.raises(AntiphonError) as refused:
        one_rank.generate(prompts, SamplingParams(max_tokens=1))
    assert_refused(refused)


@pytest.mark.parametrize("params", ["x", 5, {"max_tokens": 1}, [None], [], [SamplingParams()] * 3], ids=name_of)
def test_wrong_sampling_parameters_are_refused(one_rank: LLM, params: Any) -> None:
    with pytest.raises(AntiphonError) as refused:
        one_rank.generate("a", params)
    assert_refused(refused)


def test_wrong_functions_and_wrong_changes_are_refused(one_rank: LLM) -> None:
    changes: list[dict[str, Any]] = [{"dbo": "x"}, {"split": 5}, {"dbo": 5}]
    for change in changes:
        with pytest.raises(AntiphonError) as refused:
            one_rank.reconfigure(**change)
        assert_refused(refused)
    with pytest.raises(AntiphonError) as refused:
        one_rank.generate("a", progress=5)  # type: ignore[arg-type]
    assert_refused(refused)
    assert len(one_rank.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
