"""Keys of vLLM-Ascend's `additional_config`, and whole command lines of the two systems, as their users type them."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from antiphon.config.ascend_aliases import additional_config
from antiphon.config.keywords import make_config
from antiphon.core.errors import OptionError
from tests.support.asked import AskedError, run_command, stop_before_start
from tests.support.errors import raises

KEYS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # (the configuration, our options, the keys with a note)
    ({"expert_tensor_parallel_size": 1, "refresh": False, "expert_map_path": None}, {}, []),
    ({"expert_tensor_parallel_size": "0"}, {}, []),
    ({"enable_inter_dp_scheduling": True}, {}, []),
    ({"enable_inter_dp_scheduling": False}, {}, ["enable_inter_dp_scheduling"]),
    ({"init_torchair_graph_batch_sizes": True}, {}, ["init_torchair_graph_batch_sizes"]),
    ({"torchair_graph_batch_sizes": [24]}, {}, ["torchair_graph_batch_sizes"]),
    ({"trace_recompiles": True}, {}, ["trace_recompiles"]),
    ({"enable_graph_mode": False, "trace_recompiles": False}, {}, []),
    ({"enable_graph_mode": True}, {"enforce_eager": False}, []),
    (
        {"enable_graph_mode": True, "torchair_graph_batch_sizes": [24]},
        {"enforce_eager": False, "cuda_graph_sizes": "24,"},
        [],
    ),
    (
        {"torchair_graph_config": {"enabled": True, "graph_batch_sizes": [1, 24], "use_cached_graph": True}},
        {"enforce_eager": False, "cuda_graph_sizes": "1,24"},
        ["torchair_graph_config: use_cached_graph"],
    ),
    ({"xlite_graph_config": {"enabled": True, "full_mode": True}}, {"enforce_eager": False}, ["xlite_graph_config"]),
    ({"ascend_scheduler_config": {}}, {}, []),
    ({"ascend_scheduler_config": {"enabled": False, "enable_chunked_prefill": True}}, {}, []),
    (
        {"ascend_scheduler_config": {"enabled": True}},
        {},
        ["ascend_scheduler_config"],
    ),
    (
        {"ascend_scheduler_config": {"enable_chunked_prefill": False, "max_num_seqs": 4, "policy": "fcfs"}},
        {"chunked_prefill": False, "max_num_seqs": 4},
        [],
    ),
    ({"torchair_graph_config": {"enabled": False}}, {}, []),
    (
        {"torchair_graph_config": {"enabled": False, "use_cached_graph": True, "graph_batch_sizes": [1, 2]}},
        {},
        ["torchair_graph_config: use_cached_graph", "torchair_graph_config: graph_batch_sizes"],
    ),
    ({"torchair_graph_config": {"enable_multistream_mla": False, "graph_batch_sizes_init": False}}, {}, []),
    ({"multistream_overlap_shared_expert": True, "enable_shared_expert_dp": True}, {}, []),
    ({"weight_prefetch_config": {"enabled": True}}, {}, ["weight_prefetch_config"]),
    ({"enable_weight_nz_layout": True, "kv_cache_dtype": None}, {}, ["enable_weight_nz_layout"]),
    ({"num_micro_batches": 3, "imbalance_ratio": 0.2}, {"micro_batches": 3, "imbalance_ratio": 0.2}, []),
]

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # (the configuration, the option of the error, what its remedy contains)
    ({"expert_tensor_parallel_size": 16}, "c: expert_tensor_parallel_size", "ranks=N"),
    ({"torchair_graph_config": {"graph_batch_size": [28]}}, "c: torchair_graph_config", "'graph_batch_sizes'"),
    ({"torchair_graph_config": True}, "c: torchair_graph_config", '{"key": "value"}'),
    ({"dynamic_eplb": True}, "c: dynamic_eplb", "leave it out"),
    ({"expert_map_path": "map.json"}, "c: expert_map_path", "leave it out"),
    ({"init_redundancy_expert": 2}, "c: init_redundancy_expert", "leave it out"),
    ({"kv_cache_dtype": "int8"}, "c: kv_cache_dtype", "leave it out"),
    ({"oproj_tensor_parallel_size": 4}, "c: oproj_tensor_parallel_size", "ranks=N"),
    ({"ascend_scheduler_config": {"policy": "priority"}}, "c: ascend_scheduler_config: policy", "'fcfs'"),
    ({"ascend_scheduler_config": {"polcy": "fcfs"}}, "c: ascend_scheduler_config", "'policy'"),
    (
        {"ascend_scheduler_config": {"enable_chunked_prefill": True, "chunked_prefill_enabled": False}},
        "chunked_prefill",
        "leave one of them out",
    ),
    ({"enable_interdp_scheduling": True}, "c", "'enable_inter_dp_scheduling'"),
]


@pytest.mark.parametrize(("config", "own", "noted"), KEYS)
def test_what_a_key_means(config: dict[str, Any], own: dict[str, Any], noted: list[str]) -> None:
    found, notes = additional_config("c", config)
    assert found == own
    assert len(notes) == len(noted)
    for note, key in zip(notes, noted, strict=True):
        assert re.match(rf"c: {key}\b", note)


@pytest.mark.parametrize(("config", "option", "remedy"), REFUSED)
def test_what_does_not_exist_is_refused(config: dict[str, Any], option: str, remedy: str) -> None:
    with raises(OptionError, option=option, remedy=remedy):
        additional_config("c", config)


def test_a_size_said_twice_is_no_contradiction() -> None:
    config = {"ascend_scheduler_config": {"max_model_len": "2k"}}
    for written in ("2k", 2000, "2000"):
        made = make_config({"max_model_len": written, "additional_config": config})
        assert made.max_model_len == 2000
    with raises(OptionError, "max_model_len=2000", option="max_model_len", value=2048):
        make_config({"max_model_len": "2K", "additional_config": config})
    assert make_config({"kv_cache_memory": "20G", "kv_cache_memory_bytes": "20GiB"})


def test_every_key_is_in_the_documents() -> None:
    page = (Path(__file__).parents[2] / "docs/options.md").read_text()
    section = page.partition("### vLLM-Ascend's additional config\n")[2].partition("\n## ")[0]
    with pytest.raises(OptionError) as unknown:
        additional_config("c", {"?": 1})
    known = str(unknown.value).partition("known keys are ")[2].split(", ")
    assert len(known) > 20
    assert [key for key in known if f"`{key}`" not in section] == []


# ---- whole command lines

ENGINE_B = (
    "serve deepseek-ai/DeepSeek-V2-Lite --trust-remote-code --data-parallel-size 2 --enable-expert-parallel "
    "--enforce-eager --max-model-len 32k --gpu-memory-utilization 0.85 --disable-log-requests --port 0 "
)
ENGINE_A = (
    "serve --model=deepseek-ai/DeepSeek-V2-Lite --trust-remote-code --distributed-executor-backend=mp --port 0 "
    "-dp=2 --max-num-seqs 24 --max-model-len 4096 --max-num-batched-tokens 4096 --block-size 128 -O 0 "
    "--no-enable-prefix-caching --gpu-memory-utilization 0.95 --enable-expert-parallel --compilation_config 0 "
)
CONFIG_A = (
    '{"torchair_graph_batch_sizes":[24],"expert_tensor_parallel_size":%d,"enable_inter_dp_scheduling":true,'
    '"init_torchair_graph_batch_sizes":true,"trace_recompiles":true,"ascend_scheduler_config":{},"enable_graph_mode":%s}'
)
MEANT_A = {
    "enforce_eager": True,  # by -O 0
    "model": "deepseek-ai/DeepSeek-V2-Lite",
    "ranks": 2,
    "max_num_seqs": 24,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "block_size": 128,
    "prefix_caching": False,
    "gpu_memory_utilization": 0.95,
}
MEANT_B = {
    "enforce_eager": True,
    "model": "deepseek-ai/DeepSeek-V2-Lite",
    "ranks": 2,
    "max_model_len": 32000,
    "gpu_memory_utilization": 0.85,
}
THRESHOLDS = {"dbo_prefill_token_threshold": 512, "dbo_decode_token_threshold": 32}


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        (ENGINE_B + "--enable-dbo", MEANT_B | {"dbo": "on"} | THRESHOLDS),
        (ENGINE_B, MEANT_B),
        (
            ENGINE_B + "--enable-dbo --dbo-decode-token-threshold 4",
            MEANT_B | {"dbo": "on"} | THRESHOLDS | {"dbo_decode_token_threshold": 4},
        ),
        (
            ENGINE_B + "--enable-microbatching --microbatching-token-threshold 4",
            MEANT_B | {"dbo": "on"} | THRESHOLDS | {"dbo_decode_token_threshold": 4},
        ),
        (
            ENGINE_B.replace("--enforce-eager ", "")
            + """--enable-dbo --compilation-config '{"cudagraph_mode": "full_decode_only"}'""",
            MEANT_B | {"enforce_eager": False, "dbo": "on"} | THRESHOLDS,
        ),
        (ENGINE_A + f"--additional-config '{CONFIG_A % (1, 'false')}'", MEANT_A),
        (
            ENGINE_A + f"--additional-config '{CONFIG_A % (16, 'false')}'",
            "additional_config: expert_tensor_parallel_size",
        ),
        (
            ENGINE_A + f"--additional-config '{CONFIG_A % (1, 'true')}'",
            MEANT_A | {"enforce_eager": False, "cuda_graph_sizes": "24,"},
        ),
        (ENGINE_A + "--enforce-eager --additional-config '{\"enable_graph_mode\": true}'", "enforce_eager"),
        (ENGINE_A.replace("-O 0", "-O0") + "--quantization ascend", "quantization"),
        (
            ENGINE_A.replace("-O 0", "-O3").replace("--compilation_config 0 ", ""),
            MEANT_A | {"enforce_eager": False},
        ),
        (ENGINE_A + "-tp=8", "tp"),
    ],
)
def test_command_lines_of_the_two_systems(
    line: str, outcome: dict[str, Any] | str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop_before_start(monkeypatch)
    monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)  # it would be that of other tests too
    with pytest.raises((AskedError, OptionError)) as ended, caplog.at_level(logging.WARNING):
        run_command(monkeypatch, *shlex.split(line))
    if isinstance(outcome, str):
        assert isinstance(ended.value, OptionError)
        assert ended.value.option == outcome and "\n" not in str(ended.value)
        return
    assert isinstance(ended.value, AskedError), ended.value
    assert ended.value.config == make_config(outcome)
    assert all("has no effect" in message for message in caplog.messages)
    noted = ("--trust-remote-code", "--additional-config", "-O3")
    assert len(caplog.messages) == sum(option in line for option in noted)
