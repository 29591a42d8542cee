"""Sizes that no memory holds: refused up front with what to change, before anything is allocated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon import LLM
from antiphon.comm import RankGroup
from antiphon.config import memory
from antiphon.config.cache import block_bytes
from antiphon.config.engine_config import EngineConfig
from antiphon.config.memory import check_memory, is_out_of_memory
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import ModelError, OptionError
from antiphon.engine import build
from antiphon.engine.build import build_engine, make_transport
from antiphon.engine.cache.kv_cache import allocate_cache
from antiphon.frontend.async_engine import AsyncEngine
from antiphon.models import weight_bytes
from antiphon.runtime import CpuStreams
from tests.support.errors import raises

GIB = 2**30


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 4 GiB available, on which nothing may be allocated."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(memory, "obtainable_memory", lambda: 4 * GIB)
    for name in ("make_transport", "build_model", "allocate_cache"):
        monkeypatch.setattr(build, name, refuse)
    monkeypatch.setattr("antiphon.frontend.worker_client.LocalLauncher", refuse)


def model(folder: Path, **changes: Any) -> str:
    shutil.copytree(bundled_model(), folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def error_of(*, served: bool = False, **options: Any) -> str:
    with pytest.raises((OptionError, ModelError)) as refused:
        if served:
            AsyncEngine(EngineConfig(device="cpu", **options))
        else:
            LLM(device="cpu", **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("positions", [10**7, 2 * 10**9, 2**40])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(("ranks", "served"), [(1, False), (2, False), (1, True)])
def test_a_cache_for_texts_without_end(
    tmp_path: Path, host: None, positions: int, load_format: str, ranks: int, served: bool
) -> None:
    folder = model(tmp_path / "model", max_position_embeddings=positions)
    message = error_of(model=folder, load_format=load_format, ranks=ranks, served=served)
    each = " on each of 2 ranks" if ranks == 2 else ""
    assert f"GiB{each} (made for one text of max_model_len, {positions} tokens in blocks of 16)" in message
    assert (
        "of weights, and only 4 GiB is available on this host; use a lower max_model_len (--max-model-len)" in message
    )
    assert ", or set kv_cache_memory (--kv-cache-memory) to limit it" in message


@pytest.mark.parametrize("options", [{"max_model_len": 256}, {"kv_cache_memory": 2**20}])
def test_both_remedies_help(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = model(tmp_path / "model", max_position_embeddings=2**40)
    with LLM(folder, device="cpu", **options) as llm:
        assert len(llm.generate("Once")[0].token_ids) > 0


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"kv_cache_memory": 10**12}, "use a lower kv_cache_memory (--kv-cache-memory)"),
        ({"block_size": 10**9}, "use a lower block_size (--block-size), a lower max_model_len (--max-model-len)"),
        ({"ranks": 32}, "256 MiB on each of 32 ranks (the default for CPUs, 4096 tokens in blocks of 16)"),
    ],
)
def test_a_cache_by_other_options(host: None, options: dict[str, Any], remedy: str) -> None:
    assert remedy in error_of(**options)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"vocab_size": 10**9}, "954 GiB"),
        ({"n_routed_experts": 10**9, "n_group": 1, "topk_group": 1}, "920314 GiB"),
        ({"moe_intermediate_size": 10**9}, "472069 GiB"),
        ({"num_hidden_layers": 10_000}, "65.0 GiB"),
    ],
)
def test_dummy_weights_without_end(tmp_path: Path, host: None, changes: dict[str, Any], size: str) -> None:
    message = error_of(model=model(tmp_path / "model", **changes), load_format="dummy")
    assert (
        f"take {size} in float32, and only 4 GiB is available on this host; use dtype='bfloat16', a lower num_layers"
        in message
    )


def test_weights_that_no_tensor_can_hold(tmp_path: Path, host: None) -> None:
    folder = model(tmp_path / "model", hidden_size=2**31 - 1, intermediate_size=2**31 - 1)
    assert "describe tensors that cannot exist" in error_of(model=folder, load_format="dummy")


def test_the_sum_decides_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(device="cpu", ranks=2, kv_cache_memory=10**6).resolve()
    assert config.cache is not None
    cache = config.cache.num_blocks * block_bytes(config.model, block_size=16, dtype=torch.float32)
    needed = 2 * (cache + weight_bytes(config.model, torch.float32, 2))
    monkeypatch.setattr(memory, "obtainable_memory", lambda: needed)
    check_memory(config)
    monkeypatch.setattr(memory, "obtainable_memory", lambda: needed - 1)
    with raises(OptionError, "KV cache"):
        check_memory(config)
    monkeypatch.setattr(memory, "obtainable_memory", lambda: None)  # a system that does not say
    check_memory(config)


# ---- what only the allocator can say


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_allocators_say(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize("num_blocks", [2**50, 2**70])
def test_a_cache_that_cannot_be_allocated(num_blocks: int) -> None:
    config = EngineConfig(device="cpu").resolve()
    with raises(OptionError, option="kv_cache_memory", remedy="max_model_len"):
        allocate_cache(config.model, num_blocks=num_blocks, block_size=16, dtype=torch.float32)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("not enough memory: 9")])
def test_weights_and_buffers_that_cannot_be_allocated(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise error

    config, group = EngineConfig(device="cpu", max_model_len=64).resolve(), RankGroup(rank=0, size=1)
    monkeypatch.setattr(build, "build_model", run_out)
    with raises(OptionError, "weights", "1 rank", remedy="ranks"):
        build_engine(config, group)
    monkeypatch.setattr(build, "create_transport", run_out)
    with raises(OptionError, "max_num_batched_tokens=2048"):
        make_transport(config, group, CpuStreams())
