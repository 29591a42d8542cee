"""Which device, dtype and limits the options lead to, on machines with any number of CUDA devices."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from antiphon import LLM, SamplingParams
from antiphon.comm import DataPath
from antiphon.comm.needs import peer_environment
from antiphon.config import engine_config as config_module
from antiphon.config import resolve
from antiphon.config.cache import CacheSize
from antiphon.config.describe import describe_config
from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.config.graph_sizes import CaptureReport
from antiphon.config.resolve import DEVICE_VARIABLE, resolve_device, resolve_peer_access
from antiphon.core.errors import EngineError, OptionError
from antiphon.core.policy import NEVER, OverlapPolicy
from antiphon.core.warn_once import warn_once
from antiphon.engine.messages import Ready, decode_from_worker, encode
from tests.support.errors import raises


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DEVICE_VARIABLE, "NCCL_P2P_DISABLE"):
        monkeypatch.delenv(name, raising=False)


def machine_with(monkeypatch: pytest.MonkeyPatch, num_cuda: int) -> None:
    monkeypatch.setattr(resolve, "num_devices", lambda kind: num_cuda if kind.endswith("cuda") else 0)


@pytest.mark.parametrize(
    ("device", "variable", "num_cuda", "ranks", "expected"),
    [
        ("auto", None, 0, 1, "cpu"),
        ("auto", None, 1, 1, "cuda"),
        ("auto", None, 1, 2, "cpu"),
        ("auto", None, 2, 2, "cuda"),
        ("auto", None, 8, 2, "cuda"),
        ("auto", "cpu", 8, 2, "cpu"),
        ("auto", "cuda", 2, 2, "cuda"),
        ("auto", "auto", 2, 2, "cuda"),
        ("auto", "", 2, 2, "cuda"),
        ("cpu", None, 8, 2, "cpu"),
        ("cpu", "cuda", 8, 2, "cpu"),
        ("cuda", None, 2, 2, "cuda"),
        ("cuda", "cpu", 2, 2, "cuda"),
        ("generic:cuda", None, 2, 2, "generic:cuda"),
        ("generic:cpu", None, 0, 2, "generic:cpu"),
        ("auto", "generic:cpu", 8, 2, "generic:cpu"),
    ],
)
def test_the_device(
    device: str, variable: str | None, num_cuda: int, ranks: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, num_cuda)
    if variable is not None:
        monkeypatch.setenv(DEVICE_VARIABLE, variable)
    assert resolve_device(device, ranks)[0] == expected


@pytest.mark.parametrize(
    ("device", "variable", "num_cuda", "names", "option"),
    [
        ("cuda", None, 0, ["device='cuda'", "ranks=2", "0", "CUDA_VISIBLE_DEVICES"], "device"),
        ("cuda", None, 1, ["ranks=2", "1", "device='cpu'"], "device"),
        ("generic:cuda", None, 1, ["device='generic:cuda'", "ranks=2"], "device"),
        ("xpu", None, 0, ["device='xpu'", "ranks=2", "plug-in"], "device"),
        ("npu", None, 0, ["device='npu'", "torch-npu"], "device"),
        ("auto", "cuda", 1, [f"{DEVICE_VARIABLE}='cuda'", "ranks=2", "1"], DEVICE_VARIABLE),
        ("auto", "cdua", 1, [DEVICE_VARIABLE, "'cdua'", "'cuda'"], DEVICE_VARIABLE),
        ("cudo", None, 1, ["'cudo'", "'cuda'"], "device"),
    ],
)
def test_a_device_that_cannot_be_had(
    device: str, variable: str | None, num_cuda: int, names: list[str], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, num_cuda)
    if variable is not None:
        monkeypatch.setenv(DEVICE_VARIABLE, variable)
    with raises(OptionError, *names, option=option, value=variable or device):
        resolve_device(device, 2)


@pytest.mark.parametrize(
    ("num_cuda", "ranks", "idle", "cuda", "visible", "said"),
    [
        (1, 2, 0, "13.0", None, ["2 ranks need one CUDA device each, and only 1 can", "use 1 rank, or "]),
        (2, 4, 0, "13.0", None, ["4 ranks need one CUDA device each, and only 2 can", "use 2 ranks, or "]),
        (
            0,
            2,
            8,
            None,
            None,
            ["is built without CUDA, and the machine has 8 NVIDIA GPUs", "install torch's CUDA build"],
        ),
        (0, 2, 8, "13.0", None, ["torch cannot use any of the machine's 8 NVIDIA GPU(s)", "check the driver"]),
        (0, 2, 8, "13.0", "", []),
        (0, 2, 8, "13.0", "-1", []),
        (0, 2, 0, "13.0", None, []),
        (0, 2, 0, None, None, []),
        (2, 2, 8, "13.0", None, []),
    ],
)
def test_auto_says_once_that_gpus_are_left_idle(
    num_cuda: int,
    ranks: int,
    idle: int,
    cuda: str | None,
    visible: str | None,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_once.cache_clear()
    machine_with(monkeypatch, num_cuda)
    monkeypatch.setattr(resolve, "nvidia_gpus", lambda: idle)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for _ in range(2):
        resolve_device("auto", ranks)
    resolve_device("cpu", ranks)  # as asked
    assert len(caplog.messages) == bool(said)
    for part in [*said, "orders of magnitude"] if said else []:
        assert part in caplog.messages[0]


def test_on_cuda_auto_is_bfloat16_and_the_cache_is_measured_later(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 1)
    config = EngineConfig().resolve()
    assert (config.device_kind, config.dtype_name, config.cache) == ("cuda", "bfloat16", None)
    assert ("device", "cuda", "CUDA devices: 1, ranks: 1") in config.chosen()
    assert ("dtype", "bfloat16", "the fastest on GPUs") in config.chosen()
    described = dict(describe_config(config))
    assert described["ranks"].startswith("1 on cuda, ")
    assert described["KV cache"].startswith("measured when the weights are loaded")
    assert described["attention"] == "auto: resolved when the ranks start"
    with pytest.raises(AssertionError, match="not measured"):
        _ = config.kv_capacity_tokens

    started = config.started(
        device_name="Some GPU",
        transport_name="local",
        data_path=DataPath.NONE,
        cache=CacheSize(num_blocks=101, source="90% of it"),
        attention="triton: the first choice on CUDA devices",
    )
    assert started.kv_capacity_tokens == 1600
    described = dict(describe_config(started))
    assert described["ranks"].startswith("1 on Some GPU, ")
    assert described["KV cache"].startswith("1,600 tokens per rank (")
    assert "90% of it" in described["KV cache"]
    assert described["attention"] == "triton: the first choice on CUDA devices"
    assert started.cache_facts() == {"tokens": 1600, "source": "90% of it"}


def test_memory_that_was_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 1)
    config = EngineConfig(kv_cache_memory=2**20, dtype="float32").resolve()
    assert config.cache is not None
    assert config.dtype_name == "float32"


@pytest.mark.parametrize(
    ("device", "max_model_len", "asked", "expected"),
    [
        ("cpu", None, None, 163840),
        ("cuda", None, None, 8192),
        ("cuda", 1000, None, 2048),
        ("cuda", 20000, None, 20000),
        ("cuda", None, 512, 512),
    ],
)
def test_the_largest_step(
    device: str, max_model_len: int | None, asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, 1)
    options = EngineConfig(
        model="deepseek-v2-lite",
        load_format="dummy",
        device=device,
        max_model_len=max_model_len,
        max_num_batched_tokens=asked,
    )
    assert options.resolve().max_num_batched_tokens == expected


def test_the_ready_message_carries_the_cache() -> None:
    ready = Ready(
        device_name="Some GPU",
        transport_name="host-staged",
        data_path=DataPath.HOST,
        cache=CacheSize(num_blocks=7, source="why"),
        attention="torch: as requested",
        captured=CaptureReport(),
    )
    assert decode_from_worker(encode(ready)) == ready


@pytest.mark.parametrize(
    ("asked", "variable", "expected"),
    [(True, None, True), (False, None, False), (True, "1", False), (True, "0", True), (False, "0", False)],
)
def test_peer_access(asked: bool, variable: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", variable)
    assert resolve_peer_access(asked) is expected
    options = EngineConfig(peer_access=asked, device="cpu").resolve().options
    assert options.peer_access is expected
    assert (peer_environment(peer_access=options.peer_access).get("NCCL_P2P_DISABLE") == "1") is not expected


def test_an_option_without_effect_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), LLM(gpu_memory_utilization=0.5, device="cpu") as llm:
        llm.generate("Once", SamplingParams(max_tokens=1))
        stats = llm.stats()
    (message,) = [record.message for record in caplog.records if "gpu_memory" in record.message]
    assert message == "gpu_memory_utilization=0.5 has no effect: the size of the KV cache is the default for CPUs"
    assert stats["device"].startswith("CPU (")
    assert stats["kv_cache"] == {"tokens": llm.config.kv_capacity_tokens, "source": "the default for CPUs"}


def test_closing_lets_the_weights_go_though_the_llm_is_kept() -> None:
    llm = LLM(device="cpu")
    llm.generate("Once", SamplingParams(max_tokens=2))
    model = weakref.ref(llm._client._engine.runner.model)  # type: ignore[attr-defined]
    assert model() is not None
    llm.close()
    assert model() is None
    with pytest.raises(EngineError, match="it was closed"):
        llm.generate("Once")
    llm.close()


@pytest.mark.parametrize(
    ("transport", "peer_access", "found", "expected", "reason"),
    [
        ("auto", True, "one-sided", "one-sided", "copies between peers"),
        ("auto", True, "host-staged", "host-staged", "not one-sided"),
        ("auto", False, "host-staged", "host-staged", "peer access"),
        ("alltoall", True, "alltoall", "alltoall", "as asked"),
        ("some.module:Class", True, "its-own-name", "some.module:Class", "as asked"),
    ],
)
def test_the_transport_on_gpus(
    transport: str,
    peer_access: bool,
    found: str,
    expected: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chosen before anything starts, and corrected by what the ranks find."""
    machine_with(monkeypatch, 2)
    monkeypatch.setattr("antiphon.config.engine_config.load_transport", lambda *_: None)
    config = EngineConfig(ranks=2, transport=transport, peer_access=peer_access).resolve()
    cache = CacheSize(num_blocks=3, source="")
    started = config.started(device_name="GPU", transport_name=found, data_path=DataPath.HOST, cache=cache)
    assert started.transport.name == expected
    assert reason in started.transport_reason


def test_peer_copies_that_are_forbidden_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 2)
    with raises(OptionError, option="transport", value="copy-engine", remedy="host-staged"):
        EngineConfig(ranks=2, transport="copy-engine", peer_access=False).resolve()
    with raises(OptionError, option="transport", value="copy-engine", remedy="shared-memory"):
        EngineConfig(ranks=2, transport="copy-engine", device="cpu").resolve()


def started_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
    data_path: DataPath,
    policy: OverlapPolicy,
    *,
    transport: str = "alltoall",
    enforce_eager: bool = True,
) -> ResolvedConfig:
    """What the front makes of what two ranks on GPUs have found."""
    machine_with(monkeypatch, 2)
    monkeypatch.setattr(config_module, "load_transport", lambda spec, kind: None)  # it needs CUDA's bindings
    config = EngineConfig(ranks=2, transport=transport, policy=policy, enforce_eager=enforce_eager).resolve()
    cache = CacheSize(num_blocks=10, source="a test")
    captured = CaptureReport(measured="" if enforce_eager else "serial at every size")
    return config.started(
        device_name="a GPU", transport_name=transport, data_path=data_path, cache=cache, captured=captured
    )


@pytest.mark.parametrize(
    ("data_path", "asked", "expected"),
    [
        (DataPath.PEERS, {}, "auto: off, peer access is in use, where overlap has not paid"),
        (
            DataPath.PEERS,
            {"prefill_threshold": 100},
            "auto: 2 micro-batches, cut by token, from 100 tokens per rank in prefill, never in decode: prefill as "
            "asked, and peer access is in use, where overlap has not paid",
        ),
        (
            DataPath.HOST,
            {},
            "auto: 2 micro-batches, cut by token, from 4096 tokens per rank in prefill and 4096 in decode: data goes "
            "through host memory, where overlap has paid; a step has at most 4096 tokens",
        ),
        (DataPath.PEERS, {"dbo": "on"}, "on: 2 micro-batches, cut by token, always"),
        (DataPath.PEERS, {"dbo": "off"}, "off: every step is serial"),
    ],
)
def test_the_start_up_block_says_what_auto_chose_on_gpus_and_why(
    data_path: DataPath, asked: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = started_on_gpus(monkeypatch, data_path, OverlapPolicy(**asked))
    assert dict(describe_config(started))["dbo"] == expected


@pytest.mark.parametrize("transport", ["alltoall", "allgather", "nccl-zero-cta", "copy-engine", "some.module:Class"])
def test_the_transports_name_does_not_decide(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = started_on_gpus(monkeypatch, DataPath.PEERS, OverlapPolicy(), transport=transport)
    assert peers.policy.dbo == "off"
    through_host = started_on_gpus(monkeypatch, DataPath.HOST, OverlapPolicy(), transport=transport)
    assert through_host.policy.threshold(decode_only=True) == 4096


@pytest.mark.parametrize(
    ("data_path", "asked", "expected"),
    [
        (
            DataPath.PEERS,
            {},
            "auto: 2 micro-batches, cut by token, never in prefill, as measured at the start in decode: peer access is "
            "in use, where overlap has not paid",
        ),
        (
            DataPath.HOST,
            {},
            "auto: 2 micro-batches, cut by token, from 4096 tokens per rank in prefill, as measured at the start in "
            "decode: data goes through host memory, where overlap has paid",
        ),
        (
            DataPath.HOST,
            {"decode_threshold": 64},
            "auto: 2 micro-batches, cut by token, from 4096 tokens per rank in prefill and 64 in decode: decode as "
            "asked, and data goes through host memory, where overlap has paid",
        ),
        (DataPath.PEERS, {"dbo": "off"}, "off: every step is serial"),
    ],
)
def test_decode_steps_that_are_captured_are_measured(
    data_path: DataPath, asked: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = started_on_gpus(monkeypatch, data_path, OverlapPolicy(**asked), enforce_eager=False)
    assert dict(describe_config(started))["dbo"].partition("; a step has at most")[0] == expected


def test_auto_is_open_until_the_ranks_have_looked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine_with(monkeypatch, 2)
    monkeypatch.setattr(config_module, "load_transport", lambda spec, kind: None)
    config = EngineConfig(ranks=2, enforce_eager=True).resolve()
    assert config.policy == OverlapPolicy()
    assert dict(describe_config(config))["dbo"] == (
        "auto: resolved when the ranks know whether their devices reach each other"
    )
    cache = CacheSize(num_blocks=10, source="a test")
    with caplog.at_level(logging.INFO):
        config.started(device_name="GPU", transport_name="copy-engine", data_path=DataPath.PEERS, cache=cache)
    assert "dbo: auto -> off: peer access is in use, where overlap has not paid" in caplog.messages


def test_a_threshold_that_no_step_reaches_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 2)
    monkeypatch.setattr(config_module, "load_transport", lambda spec, kind: None)
    config = EngineConfig(ranks=2, peer_access=False, max_num_batched_tokens=2048).resolve()
    cache = CacheSize(num_blocks=10, source="a test")
    started = config.started(device_name="GPU", transport_name="host-staged", data_path=DataPath.HOST, cache=cache)
    assert dict(describe_config(started))["dbo"].endswith("; a step has at most 2048 tokens")
    never = replace(started, options=replace(started.options, policy=OverlapPolicy(prefill_threshold=NEVER)))
    assert "a step has at most" not in dict(describe_config(never))["dbo"]


@pytest.mark.parametrize(("dbo", "off"), [("auto", "dbo='auto', which is off here"), ("off", "dbo='off'")])
def test_options_that_overlap_being_off_makes_void_are_named(
    dbo: str, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = OverlapPolicy(dbo=dbo, min_total_tokens=256)
    expected = [f"min_total_tokens_to_split=256 has no effect with {off}: no step is split"]
    assert started_on_gpus(monkeypatch, DataPath.PEERS, policy).without_effect() == expected
    assert started_on_gpus(monkeypatch, DataPath.HOST, policy).without_effect() == (expected if dbo == "off" else [])


def test_a_share_of_the_memory_that_sizes_the_cache_is_not_called_void(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 1)
    config = EngineConfig(gpu_memory_utilization=0.5).resolve()
    cache = CacheSize(num_blocks=10, source="50% of 80 GiB")
    started = config.started(device_name="GPU", transport_name="local", data_path=DataPath.NONE, cache=cache)
    assert config.without_effect() == started.without_effect() == []
