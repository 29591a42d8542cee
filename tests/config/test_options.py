"""Options of `LLM`: ours by every way in, and the table of those that users of other engines type, on both ways in."""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM
from antiphon.config.aliases import FOREIGN_OPTIONS
from antiphon.config.describe import describe_config
from antiphon.config.engine_config import EngineConfig
from antiphon.config.keywords import make_config
from antiphon.config.options import OPTION_DEFAULTS, OPTIONS
from antiphon.config.resolve import ASCEND_DBO_VARIABLE, DBO_VARIABLE
from antiphon.core.errors import OptionError
from antiphon.core.options import options_of
from antiphon.core.policy import OverlapPolicy
from antiphon.device.table import DEVICES
from antiphon.kernels.attention import BACKEND_NAMES
from tests.support.asked import AskedError, run_command, stop_before_start
from tests.support.errors import raises

SAME: dict[str, Any] = {}


@dataclass(frozen=True)
class Refused:
    """An `OptionError`. remedy: an identifier or value that its remedy contains. option: by default the one given."""

    remedy: str
    option: str = ""


@dataclass(frozen=True)
class Note:
    """One note says that the option, or a part of it, means nothing here. own: what the rest means."""

    own: dict[str, Any] = field(default_factory=dict)


SERVER = Refused("`antiphon serve`")
LEAVE_OUT = Refused("leave it out")
RANKS = Refused("ranks=N")
NOTE = Note()
EAGER = {"enforce_eager": True}
MODE = "cudagraph_mode"
SIZES = "cudagraph_capture_sizes"

CASES: list[tuple[str, Any, dict[str, Any] | Refused | Note]] = [
    # (name, value, what it means in our options)
    ("enable_dbo", True, {"dbo": "on", "dbo_decode_token_threshold": 32, "dbo_prefill_token_threshold": 512}),
    ("enable_dbo", False, {"dbo": "off"}),
    ("enable_microbatching", True, {"dbo": "on", "dbo_decode_token_threshold": 32, "dbo_prefill_token_threshold": 512}),
    ("enable_two_batch_overlap", False, {"dbo": "off"}),
    ("microbatching_token_threshold", 40, {"dbo_decode_token_threshold": 40}),
    ("microbatching_token_threshold", "4k", {"dbo_decode_token_threshold": 4000}),
    ("num_ubatches", 3, {"micro_batches": 3}),
    ("ubatch_size", 4, {"micro_batches": 4}),
    ("ubatch_size", 0, SAME),
    ("ubatch_size", 9, Refused("2 to 8", option="micro_batches")),
    ("additional_config", {}, SAME),
    ("additional_config", {"torchair_graph_config": {"enabled": False}}, SAME),
    ("additional_config", {"torchair_graph_config": {"enabled": True}}, SAME),
    (
        "additional_config",
        {"torchair_graph_config": {"enabled": True, "graph_batch_sizes": [4, 8]}},
        {"cuda_graph_sizes": "4,8"},
    ),
    ("additional_config", {"ascend_scheduler_config": {"enabled": True}}, NOTE),
    (
        "additional_config",
        {"min_total_tokens_to_split": 256, "min_prefill_tokens_to_split": 64, "imbalance_ratio": 0.2},
        {"min_total_tokens_to_split": 256, "min_prefill_tokens_to_split": 64, "imbalance_ratio": 0.2},
    ),
    ("additional_config", {"num_micro_batches": 3}, {"micro_batches": 3}),
    ("additional_config", {"min_total_tokens_to_splt": 1}, Refused("'min_total_tokens_to_split'")),
    ("additional_config", {"zzz": "x"}, Refused("torchair_graph_config")),
    ("additional_config", 3, Refused('{"key": "value"}')),
    ("data_parallel_size", 2, {"ranks": 2}),
    ("data_parallel_size", 0, Refused("1", option="ranks")),
    ("dp", 4, {"ranks": 4}),
    ("tensor_parallel_size", 1, SAME),
    ("tensor_parallel_size", 16, RANKS),
    ("tp", 2, RANKS),
    ("pipeline_parallel_size", 1, SAME),
    ("pp", 2, RANKS),
    ("enable_expert_parallel", True, SAME),
    ("enable_expert_parallel", False, Refused("ranks=1")),
    ("expert_placement_strategy", "linear", SAME),
    ("expert_placement_strategy", "round_robin", Refused("'linear'")),
    ("enable_eplb", True, LEAVE_OUT),
    ("enable_eplb", False, SAME),
    ("all2all_backend", "deepep_low_latency", Refused("transport='auto'")),
    ("all2all_backend", "naive", Refused("transport='allgather'")),
    ("moe_a2a_backend", "deepep", Refused("transport='auto'")),
    ("distributed_executor_backend", "mp", SAME),
    ("distributed_executor_backend", "ray", LEAVE_OUT),
    ("data_parallel_size_local", 1, RANKS),
    ("data_parallel_address", "10.0.0.1", RANKS),
    ("data_parallel_rpc_port", 13345, RANKS),
    ("headless", True, RANKS),
    ("disable_custom_all_reduce", True, NOTE),
    # graphs: vLLM, then SGLang
    ("enforce_eager", True, EAGER),
    ("enforce_eager", False, SAME),
    ("cuda_graph_sizes", [1, 2, 4], {"cuda_graph_sizes": "1,2,4"}),
    ("cuda_graph_sizes", "1,2,4", {"cuda_graph_sizes": "1,2,4"}),
    ("cuda_graph_sizes", 32, {"cuda_graph_sizes": "32"}),
    ("cuda_graph_sizes", [32], {"cuda_graph_sizes": "32"}),
    (SIZES, [1, 2, 4], {"cuda_graph_sizes": "1,2,4"}),
    (SIZES, [8], {"cuda_graph_sizes": "8,"}),
    ("max_cudagraph_capture_size", 64, {"cuda_graph_sizes": "64"}),
    ("max_cudagraph_capture_size", 0, EAGER),
    ("compilation_config", {}, SAME),
    ("compilation_config", {MODE: "none"}, EAGER),
    ("compilation_config", {MODE: "NONE", "mode": 0, SIZES: []}, EAGER),
    ("compilation_config", {MODE: 0}, EAGER),
    ("compilation_config", {MODE: "full_decode_only", "level": 0}, SAME),
    ("compilation_config", {MODE: "FULL_AND_PIECEWISE"}, SAME),
    ("compilation_config", {MODE: None, "compile_sizes": []}, SAME),
    ("compilation_config", {MODE: "full"}, NOTE),
    ("compilation_config", {MODE: 2, SIZES: [2, 4]}, Note({"cuda_graph_sizes": "2,4"})),
    ("compilation_config", {MODE: "PIECEWISE"}, NOTE),
    ("cc", {MODE: 1}, NOTE),
    ("compilation_config", {MODE: "fulll"}, Refused("'full'", option="compilation_config: cudagraph_mode")),
    ("compilation_config", {SIZES: [1, 2], "max_cudagraph_capture_size": 2}, {"cuda_graph_sizes": "1,2"}),
    ("compilation_config", {"max_cudagraph_capture_size": 16}, {"cuda_graph_sizes": "16"}),
    ("compilation_config", {"mode": 3}, NOTE),
    ("compilation_config", {"level": 0}, EAGER),
    ("compilation_config", 0, EAGER),
    ("compilation_config", 3, NOTE),
    ("compilation_config", {"splitting_ops": ["x"]}, LEAVE_OUT),
    ("disable_cuda_graph", True, EAGER),
    ("disable_cuda_graph", False, SAME),
    ("cuda_graph_max_bs", 16, {"cuda_graph_sizes": "16"}),
    ("cuda_graph_max_bs", -1, Refused("0")),
    ("cuda_graph_bs", [1, 2, 4], {"cuda_graph_sizes": "1,2,4"}),
    # launching ahead
    ("async_scheduling", True, SAME),
    ("async_scheduling", False, {"async_scheduling": False}),
    ("disable_overlap_schedule", True, {"async_scheduling": False}),
    ("disable_overlap_schedule", False, SAME),
    ("speculative_config", {"method": "mtp"}, LEAVE_OUT),
    ("enable_prefix_caching", False, {"prefix_caching": False}),
    ("enable_prefix_caching", True, SAME),
    ("enable_chunked_prefill", False, {"chunked_prefill": False}),
    ("kv_cache_memory_bytes", 2**26, {"kv_cache_memory": 2**26}),
    ("kv_cache_memory_bytes", "64MiB", {"kv_cache_memory": 2**26}),
    ("kv_cache_memory_bytes", "64Q", Refused("20GiB")),
    ("mem_fraction_static", 0.8, {"gpu_memory_utilization": 0.8}),
    ("kv_cache_dtype", "auto", SAME),
    ("kv_cache_dtype", "fp8", Refused("'auto'")),
    ("num_gpu_blocks_override", 100, Refused("kv_cache_memory=BYTES")),
    ("swap_space", 4, NOTE),
    ("cpu_offload_gb", 0, SAME),
    ("cpu_offload_gb", 8, Refused("ranks")),
    ("model_path", "glm-4.5-air", {"model": "glm-4.5-air"}),
    ("trust_remote_code", True, NOTE),
    ("quantization", "fp8", LEAVE_OUT),
    ("tokenizer", "org/other", LEAVE_OUT),
    ("tokenizer_mode", "auto", SAME),
    ("tokenizer_mode", "slow", Refused("'auto'")),
    ("tokenizer_revision", "main", LEAVE_OUT),
    ("code_revision", "main", NOTE),
    ("hf_overrides", {"a": 1}, Refused("config.json")),
    ("hf_overrides", {"architectures": ["DeepseekDBOForCausalLM"]}, {"dbo": "on"}),
    ("hf_overrides", {"architectures": ["DeepseekV2ForCausalLM"]}, Refused("config.json")),
    ("rope_scaling", {"factor": 2}, Refused("config.json")),
    ("generation_config", "vllm", NOTE),
    ("download_dir", "/data", Refused("HF_HUB_CACHE")),
    ("hf_token", "secret", Refused("HF_TOKEN")),
    ("enable_lora", True, Refused("checkpoint")),
    ("lora_modules", ["a=b", "c=d"], Refused("checkpoint")),
    ("task", "generate", SAME),
    ("runner", "pooling", LEAVE_OUT),
    ("disable_log_requests", True, SAME),
    ("enable_log_requests", True, LEAVE_OUT),
    ("enable_log_requests", False, SAME),
    ("disable_log_stats", True, SAME),
    ("host", "0.0.0.0", SERVER),
    ("port", 8000, SERVER),
    ("served_model_name", ["x", "y"], SERVER),
    ("allowed_origins", ["*"], SERVER),
    ("allowed_methods", ["GET"], SERVER),
    ("allowed_headers", ["authorization"], SERVER),
    ("allow_credentials", True, SERVER),
    ("middleware", ["a.B"], Refused("proxy")),
    ("api_key", "x", SERVER),
    ("chat_template", "x", LEAVE_OUT),
    ("tool_call_parser", "x", LEAVE_OUT),
    ("enable_auto_tool_choice", True, LEAVE_OUT),
    ("reasoning_parser", "x", SERVER),
    ("default_chat_template_kwargs", {"enable_thinking": False}, SERVER),
]


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_before_start(monkeypatch)


def as_words(name: str, value: object) -> list[str]:
    """How the option is typed."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    dashes = "-" if len(name) == 2 else "--"
    values = value if isinstance(value, list) else [value]
    words = [one if isinstance(one, str) else json.dumps(one) for one in values]
    return [f"{dashes}{flag}", *words]


def by_command_line(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    run_command(monkeypatch, "generate", "--prompt", "x", *words)


def by_file(monkeypatch: pytest.MonkeyPatch, folder: Path, options: dict[str, Any]) -> None:
    (folder / "options.yaml").write_text(json.dumps(options))  # which is YAML too
    by_command_line(monkeypatch, "--config", str(folder / "options.yaml"))


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize("way", ["LLM", "command line", "file"])
@pytest.mark.parametrize(("name", "value", "outcome"), CASES)
def test_options_of_other_engines(
    name: str,
    value: Any,
    outcome: dict[str, Any] | Refused | Note,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    with pytest.raises((AskedError, OptionError)) as ended, caplog.at_level(logging.WARNING):
        if way == "LLM":
            LLM(**{name: value})
        elif way == "file":
            by_file(monkeypatch, tmp_path, {name: value})
        else:
            by_command_line(monkeypatch, *as_words(name, value))
    error = ended.value
    if isinstance(outcome, Refused):
        assert isinstance(error, OptionError), error
        assert "\n" not in str(error)
        assert error.option and error.option.strip("-").replace("-", "_") == (outcome.option or name)
        assert outcome.remedy in error.remedy, error
        return
    assert isinstance(error, AskedError), error
    assert error.config == make_config(outcome.own if isinstance(outcome, Note) else outcome)
    assert [name in note for note in caplog.messages] == [True] * isinstance(outcome, Note)


@pytest.mark.parametrize("name", ["hf_token", "api_key"])
def test_secrets_are_not_repeated(name: str) -> None:
    with pytest.raises(OptionError) as ended:
        LLM(**{name: "hf_12345"})
    assert "12345" not in str(ended.value)


def test_every_option_of_the_table_is_tested() -> None:
    tested = {name for name, _, _ in CASES}
    for option in FOREIGN_OPTIONS:
        assert tested & set(option.names), option.name


def test_no_name_is_both_ours_and_another_engines() -> None:
    names = [name for option in FOREIGN_OPTIONS for name in option.names]
    assert len(names) == len(set(names))
    assert not set(names) & set(OPTION_DEFAULTS)


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("options", "words", "option", "value"),
    [
        ({"data_parallel_size": 2, "ranks": 4}, ["--ranks", "4", "-dp", "2"], "ranks", 4),
        ({"enable_dbo": True, "dbo": "off"}, ["--enable-dbo", "--dbo=off"], "dbo", "off"),
        (
            {"enable_dbo": True, "enable_microbatching": False},
            ["--enable-dbo", "--no-enable-microbatching"],
            "dbo",
            "off",
        ),
        (
            {"disable_cuda_graph": False, "enforce_eager": True},
            ["--no-disable-cuda-graph", "--enforce-eager"],
            "enforce_eager",
            True,
        ),
        (
            {"microbatching_token_threshold": 5, "dbo_decode_token_threshold": 6},
            ["--microbatching-token-threshold", "5", "--dbo_decode_token_threshold", "6"],
            "dbo_decode_token_threshold",
            6,
        ),
    ],
)
def test_options_that_contradict_each_other(
    options: dict[str, Any], words: list[str], option: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises(OptionError, option=option, value=value, remedy="one of them"):
        LLM(**options)
    with raises(OptionError, option=option, value=value, remedy="one of them"):
        by_command_line(monkeypatch, *words)


@pytest.mark.usefixtures("no_start")
def test_a_default_on_the_command_line_contradicts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(OptionError, "ranks=2", "ranks=1"):
        by_command_line(monkeypatch, "--ranks", "1", "--data-parallel-size", "2")


@pytest.mark.usefixtures("no_start")
def test_thresholds_that_are_given_win_over_those_of_enable_dbo(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = OverlapPolicy(dbo="on", prefill_threshold=100, decode_threshold=32)
    with pytest.raises(AskedError) as ended:
        LLM(enable_dbo=True, dbo_prefill_token_threshold=100)
    assert ended.value.config.policy == expected
    with pytest.raises(AskedError) as ended:
        by_command_line(monkeypatch, "--enable-dbo", "--dbo-prefill-token-threshold", "100")
    assert ended.value.config.policy == expected


def test_the_options_of_llm_and_their_defaults_are_those_of_the_engine() -> None:
    parameters = inspect.signature(LLM.__init__).parameters
    assert {*parameters} == {"self", *OPTIONS, "on_start", "launcher", "options"}
    own = {name: p.default for name, p in parameters.items() if name in OPTIONS}
    assert own == dict(OPTION_DEFAULTS)
    assert set(options_of(OverlapPolicy)) <= set(own)
    assert next(iter(inspect.signature(LLM).parameters)) == "model"
    assert parameters["max_model_len"].annotation == int | str | None
    for name, option in OPTIONS.items():
        assert f"{name}: {option.help}" in str(LLM.__init__.__doc__)


def test_the_kinds_of_devices_that_help_lists_are_those_of_the_table() -> None:
    assert ", ".join(("auto", *DEVICES)) in OPTIONS["device"].help
    assert ", ".join(("auto", *BACKEND_NAMES)) in OPTIONS["attention_backend"].help


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rank", "'ranks'"),
        ("max_num_seq", "'max_num_seqs'"),
        ("enable_dboo", "'enable_dbo'"),
        ("tensor_parallel", "'tensor_parallel_size'"),
        ("min_total_tokens", "'min_total_tokens_to_split'"),
    ],
)
def test_a_misspelt_option_names_the_nearest(name: str, near: str) -> None:
    with raises(OptionError, option=name, remedy=near):
        LLM(**{name: 2})


def test_an_option_far_from_all_gives_the_list() -> None:
    with raises(OptionError, "'zzz'", "'model', "):
        LLM(zzz=1)


# ---- the environment


@pytest.mark.parametrize(
    ("setting", "dbo"), [("1", "on"), ("0", "off"), ("on", "on"), ("off", "off"), ("auto", "auto")]
)
def test_the_environment_says_what_auto_is(setting: str, dbo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DBO_VARIABLE, setting)
    config = EngineConfig(ranks=2).resolve()
    assert config.options.policy.dbo == config.policy.dbo == dbo
    assert dict(describe_config(config))["dbo"].endswith(f"by {DBO_VARIABLE}={setting}")
    assert EngineConfig(policy=OverlapPolicy(dbo="off")).resolve().policy.dbo == "off"
    assert EngineConfig(policy=OverlapPolicy(dbo="on")).resolve().dbo_source == ""


@pytest.mark.parametrize(
    ("dbo", "ours", "ascend", "expected", "source", "told"),
    [
        ("auto", None, "1", "on", "VLLM_ASCEND_ENABLE_DBO=1", []),
        ("auto", None, "0", "auto", "", []),
        ("auto", "off", "0", "off", "ANTIPHON_DBO=off", []),
        ("auto", "1", "1", "on", "ANTIPHON_DBO=1", []),
        (
            "auto",
            "off",
            "1",
            "off",
            "ANTIPHON_DBO=off",
            ["VLLM_ASCEND_ENABLE_DBO=1 has no effect: ANTIPHON_DBO=off takes precedence with dbo='off'"],
        ),
        ("on", None, "1", "on", "", []),
        (
            "off",
            None,
            "1",
            "off",
            "",
            ["VLLM_ASCEND_ENABLE_DBO=1 has no effect: the option takes precedence with dbo='off'"],
        ),
        (
            "off",
            "on",
            None,
            "off",
            "",
            ["ANTIPHON_DBO=on has no effect: the option takes precedence with dbo='off'"],
        ),
    ],
)
def test_vllm_ascends_variable_acts_as_ours_and_comes_last(
    dbo: str,
    ours: str | None,
    ascend: str | None,
    expected: str,
    source: str,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in ((DBO_VARIABLE, ours), (ASCEND_DBO_VARIABLE, ascend)):
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)
    config = EngineConfig(ranks=2, policy=OverlapPolicy(dbo=dbo)).resolve()
    assert (config.policy.dbo, config.dbo_source) == (expected, source)
    assert dict(describe_config(config))["dbo"].endswith(f", by {source}") or not source
    assert config.without_effect() == told


@pytest.mark.parametrize(
    ("variable", "known"), [("ANTIPHON_DBO", "0, 1, auto, off, on"), ("VLLM_ASCEND_ENABLE_DBO", "0, 1")]
)
def test_an_unknown_setting_of_the_environment_is_refused(
    variable: str, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "yes")
    with raises(OptionError, f"{variable}='yes'", known):
        EngineConfig().resolve()


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("VLLM_ALL2ALL_BACKEND", "pplx", ["VLLM_ALL2ALL_BACKEND=pplx has no effect here; use transport='auto' or "]),
    ],
)
def test_variables_of_other_engines_are_not_obeyed_and_said_so(
    variable: str, value: str, told: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(AskedError) as ended:
        LLM()
    assert ended.value.config.policy.dbo == "auto"
    assert [message[: len(start)] for message, start in zip(caplog.messages, told, strict=True)] == told


@pytest.mark.parametrize(
    ("given", "meant"),
    [("FLASHINFER", "flashinfer"), ("TRITON_ATTN", "triton"), ("TRITON_MLA", "triton"), ("TORCH_SDPA", "torch")],
)
def test_names_of_attention_backends_of_other_engines(given: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_config({"attention_backend": given}).attention_backend == meant
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", given)
    assert make_config({}).attention_backend == meant
    assert make_config({"attention_backend": "cudnn"}).attention_backend == "cudnn"


def test_an_attention_backend_that_is_not_here_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with raises(OptionError, "attention_backend='FLASH_ATTN'", "triton"):
        make_config({"attention_backend": "FLASH_ATTN"}).resolve()
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASH_ATTN")
    assert make_config({}).attention_backend == "auto"
    assert "VLLM_ATTENTION_BACKEND=FLASH_ATTN has no effect here" in caplog.text


# ---- what the start-up block says


@pytest.mark.parametrize(
    ("options", "heading", "words"),
    [
        (
            {},
            "KV cache",
            "139,792 tokens per rank (256 MiB, the default for CPUs), texts up to 4,096 tokens, prefix caching on",
        ),
        ({"prefix_caching": False}, "KV cache", "prefix caching off"),
        (
            {"max_num_batched_tokens": 300},
            "steps",
            "up to 300 tokens and 256 requests per rank; prompts may take several",
        ),
        ({"chunked_prefill": False}, "steps", "prompts are cut only where they are longer than that"),
    ],
)
def test_the_start_up_block(options: dict[str, Any], heading: str, words: str) -> None:
    assert words in dict(describe_config(EngineConfig(**options).resolve()))[heading]
