"""Keys of vLLM-Ascend's `additional_config`, and whole command lines of the two systems, as their users type them."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import pytest

from antiphon.config.ascend_aliases import NO_GRAPHS, additional_config
from antiphon.config.keywords import make_config
from antiphon.core.errors import OptionError
from tests.support.asked import AskedError, run_command, stop_before_start
from tests.support.errors import raises

NO_EXPERT_SLICES = "experts are not cut, each lies whole on one rank; leave it out, and use ranks=N"
NO_TENSOR_PARALLELISM = "there is no tensor parallelism yet; "
ONE_SCHEDULER = "there is one scheduler, which serves requests in the order of their arrival"

KEYS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # (the configuration, our options, how the notes end)
    ({"expert_tensor_parallel_size": 1, "refresh": False, "expert_map_path": None}, {}, []),
    ({"expert_tensor_parallel_size": "0"}, {}, []),
    ({"enable_inter_dp_scheduling": True}, {}, []),
    ({"enable_inter_dp_scheduling": False}, {}, ["has no effect: it is always on"]),
    ({"init_torchair_graph_batch_sizes": True}, {}, ["has no effect: there are no graphs"]),
    ({"torchair_graph_batch_sizes": [24]}, {}, ["=[24] has no effect: there are no graphs"]),
    ({"trace_recompiles": True}, {}, ["has no effect: nothing is compiled by torch.compile"]),
    ({"enable_graph_mode": False, "trace_recompiles": False}, {}, []),
    ({"ascend_scheduler_config": {}}, {}, []),
    ({"ascend_scheduler_config": {"enabled": False, "enable_chunked_prefill": True}}, {}, []),
    (
        {"ascend_scheduler_config": {"enabled": True}},
        {},
        ["chunked_prefill=False keeps prompts whole, as that one does"],
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
        ["use_cached_graph=True has no effect: there are no graphs", "=[1, 2] has no effect: there are no graphs"],
    ),
    ({"torchair_graph_config": {"enable_multistream_mla": False, "graph_batch_sizes_init": False}}, {}, []),
    ({"multistream_overlap_shared_expert": True, "enable_shared_expert_dp": True}, {}, []),
    ({"weight_prefetch_config": {"enabled": True}}, {}, ["has no effect: weights lie on their device"]),
    ({"enable_weight_nz_layout": True, "kv_cache_dtype": None}, {}, ["has no effect: it is a memory layout of NPUs"]),
    ({"num_micro_batches": 3, "imbalance_ratio": 0.2}, {"micro_batches": 3, "imbalance_ratio": 0.2}, []),
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"expert_tensor_parallel_size": 16}, f"c: expert_tensor_parallel_size=16: {NO_EXPERT_SLICES}"),
    ({"enable_graph_mode": True}, f"c: enable_graph_mode=True: {NO_GRAPHS}; leave it out"),
    ({"torchair_graph_config": {"enabled": True, "graph_batch_sizes": [24]}}, f"is enabled, but {NO_GRAPHS}; leave it"),
    ({"torchair_graph_config": {"graph_batch_size": [28]}}, "did you mean 'graph_batch_sizes'?"),
    ({"torchair_graph_config": True}, "torchair_graph_config=True is not an object"),
    ({"xlite_graph_config": {"enabled": True}}, f"is enabled, but {NO_GRAPHS}"),
    ({"dynamic_eplb": True}, "experts lie in order and are not moved while running; leave it out"),
    ({"expert_map_path": "map.json"}, "experts lie in order and are not moved while running; leave it out"),
    ({"init_redundancy_expert": 2}, "each expert lies on one rank; leave it out"),
    ({"kv_cache_dtype": "int8"}, "the KV cache has the dtype of the computation; leave it out"),
    ({"oproj_tensor_parallel_size": 4}, NO_TENSOR_PARALLELISM),
    (
        {"ascend_scheduler_config": {"policy": "priority"}},
        "requests are served in the order of their arrival; use 'fcfs'",
    ),
    ({"ascend_scheduler_config": {"polcy": "fcfs"}}, "did you mean 'policy'?"),
    (
        {"ascend_scheduler_config": {"enable_chunked_prefill": True, "chunked_prefill_enabled": False}},
        "means both chunked_prefill=True and False; leave one of them out",
    ),
    ({"enable_interdp_scheduling": True}, "did you mean 'enable_inter_dp_scheduling'?"),
]


@pytest.mark.parametrize(("config", "own", "endings"), KEYS)
def test_what_a_key_means(config: dict[str, Any], own: dict[str, Any], endings: list[str]) -> None:
    found, notes = additional_config("c", config)
    assert found == own
    assert len(notes) == len(endings)
    for note, ending in zip(notes, endings, strict=True):
        assert note.startswith("c: ") and note.endswith(ending)


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_does_not_exist_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        additional_config("c", config)
    assert message in str(refused.value)


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
    known = str(unknown.value).partition("known here are ")[2].split(", ")
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
            f"compilation_config: cudagraph_mode='full_decode_only': {NO_GRAPHS}",
        ),
        (ENGINE_A + f"--additional-config '{CONFIG_A % (1, 'false')}'", MEANT_A),
        (ENGINE_A + f"--additional-config '{CONFIG_A % (16, 'false')}'", NO_EXPERT_SLICES),
        (ENGINE_A + f"--additional-config '{CONFIG_A % (1, 'true')}'", f"enable_graph_mode=True: {NO_GRAPHS}"),
        (ENGINE_A.replace("-O 0", "-O0") + "--quantization ascend", "weights are quantized only by their checkpoint"),
        (ENGINE_A.replace("-O 0", "-O3"), "mode=3: nothing is compiled by torch.compile; leave it out"),
        (ENGINE_A + "-tp=8", f"tp=8: {NO_TENSOR_PARALLELISM}use ranks=N"),
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
        assert outcome in str(ended.value) and "\n" not in str(ended.value)
        return
    assert isinstance(ended.value, AskedError), ended.value
    assert ended.value.config == make_config(outcome)
    assert all("has no effect" in message for message in caplog.messages)
    assert len(caplog.messages) == 1 + ("additional" in line)  # one of --trust-remote-code
