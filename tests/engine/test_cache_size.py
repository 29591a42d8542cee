"""The size of a GPU's KV cache: the arithmetic, and the largest step run on the CPU with made-up memory figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from antiphon.comm import RankGroup
from antiphon.config.cache import CacheSize, block_bytes
from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.core.errors import OptionError
from antiphon.device.cpu import CpuDevice
from antiphon.device.device import DeviceMemory
from antiphon.engine.build import build_engine
from antiphon.engine.cache.kv_cache import blocks_that_fit, largest_batch, measured_cache
from antiphon.engine.step import StepEngine
from tests.support.errors import raises

GIB = 2**30


@pytest.mark.parametrize(
    ("total_bytes", "used_bytes", "utilization", "bytes_per_block", "expected"),
    [
        (1000, 400, 0.9, 100, 5),
        (1000, 401, 0.9, 100, 4),
        (1000, 400, 1.0, 100, 6),
        (1000, 900, 0.9, 100, 0),
        (1000, 950, 0.9, 100, 0),  # never less than nothing
        (140 * GIB, 60 * GIB, 0.9, 3 * 2**20, 22528),
    ],
)
def test_blocks_next_to_the_memory_in_use(
    total_bytes: int, used_bytes: int, utilization: float, bytes_per_block: int, expected: int
) -> None:
    fit = blocks_that_fit(
        total_bytes=total_bytes, used_bytes=used_bytes, utilization=utilization, bytes_per_block=bytes_per_block
    )
    assert fit == expected
    if fit:
        assert (
            used_bytes + fit * bytes_per_block <= total_bytes * utilization < used_bytes + (fit + 1) * bytes_per_block
        )


@pytest.mark.parametrize(
    ("num_tokens", "longest", "lengths"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 9, [3]), (1, 1, [1])],
)
def test_the_largest_batch_has_the_longest_prompts(num_tokens: int, longest: int, lengths: list[int]) -> None:
    batch = largest_batch(2, num_tokens=num_tokens, longest=min(longest, num_tokens), vocab_size=50, block_size=3)
    assert batch.rank == 2
    assert batch.query_lens == lengths
    for request in batch.requests:
        assert all(0 <= token < 50 for token in request.token_ids)
        assert set(request.block_ids) == {0}
        assert 0 <= len(request.block_ids) * 3 - request.query_len < 3
    assert len({token for request in batch.requests for token in request.token_ids}) > num_tokens // 4


@pytest.fixture
def config() -> ResolvedConfig:
    return EngineConfig(max_num_batched_tokens=96, max_model_len=64, max_num_seqs=5, device="cpu").resolve()


@pytest.fixture
def engine(config: ResolvedConfig) -> Iterator[StepEngine]:
    yield build_engine(config, RankGroup(rank=0, size=1))


def measure(engine: StepEngine, config: ResolvedConfig) -> CacheSize:
    runner = engine.runner
    return measured_cache(config, runner.model, streams=engine.transport.streams, group=engine.group)


def test_the_largest_step_is_run_and_the_cache_takes_the_rest(
    engine: StepEngine, config: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    tokens: list[int] = []
    logits: list[int] = []
    model = engine.runner.model
    forward, to_logits = model.forward, model.logits  # type: ignore[attr-defined]

    def counted_forward(token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        calls.append("step")
        tokens.append(token_ids_T.shape[0])
        hidden_TD: torch.Tensor = forward(token_ids_T, positions_T)
        assert hidden_TD.isfinite().all()
        return hidden_TD

    def counted_logits(hidden_ND: torch.Tensor) -> torch.Tensor:
        logits.append(hidden_ND.shape[0])
        return to_logits(hidden_ND)

    block = block_bytes(config.model, block_size=config.options.block_size, dtype=config.dtype)
    monkeypatch.setattr(model, "forward", counted_forward)
    monkeypatch.setattr(model, "logits", counted_logits)
    monkeypatch.setattr(CpuDevice, "reset_peak", lambda self: calls.append("reset"))
    monkeypatch.setattr(CpuDevice, "peak_bytes", lambda self: (calls.append("peak"), 30 * block)[1])
    monkeypatch.setattr(CpuDevice, "memory", lambda self: DeviceMemory(0, 100 * block))
    size = measure(engine, config)
    assert calls == ["reset", "step", "peak", "reset"]  # one step, not split
    assert tokens == [96]
    assert logits == [5]
    assert size.num_blocks == 60
    assert size.source.startswith("90% of ")
    assert "a step of 96 tokens" in size.source


@pytest.mark.parametrize(("used", "fits"), [(88, True), (89, False), (95, False)])
def test_no_room_is_an_error_with_the_sizes(
    used: int, fits: bool, engine: StepEngine, config: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = block_bytes(config.model, block_size=config.options.block_size, dtype=config.dtype)
    monkeypatch.setattr(CpuDevice, "peak_bytes", lambda self: used * block)
    monkeypatch.setattr(CpuDevice, "memory", lambda self: DeviceMemory(0, 100 * block))
    if fits:
        assert measure(engine, config).num_blocks == 2
        return
    with raises(OptionError, "90%", f"{block} bytes", option="gpu_memory_utilization", value=0.9, remedy="ranks"):
        measure(engine, config)


def test_the_smallest_rank_decides(engine: StepEngine, config: ResolvedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_bytes(config.model, block_size=config.options.block_size, dtype=config.dtype)
    monkeypatch.setattr(CpuDevice, "peak_bytes", lambda self: 30 * block)
    monkeypatch.setattr(CpuDevice, "memory", lambda self: DeviceMemory(0, 100 * block))

    def with_a_smaller_peer(value: object) -> list[object]:
        return [value] if value == "loaded" else [value, (7, 83 * block, 100 * block)]

    monkeypatch.setattr(engine.group, "all_gather_object", with_a_smaller_peer)
    assert measure(engine, config).num_blocks == 7


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])  # torch's CPU allocator: the last
def test_a_step_that_does_not_fit_names_the_option(
    engine: StepEngine, config: ResolvedConfig, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def run_out(*_: object) -> torch.Tensor:
        raise kind("not enough memory: 3 GiB\nand much advice")

    monkeypatch.setattr(engine.runner.model, "forward", run_out)
    with raises(OptionError, option="max_num_batched_tokens", value=96, remedy="more ranks") as raised:
        measure(engine, config)
    assert raised.error.limit == "not enough memory: 3 GiB"
    assert "max_model_len" not in raised.error.remedy


def test_a_text_is_never_longer_than_the_memory_of_the_device(
    engine: StepEngine, config: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that allows 2**40 positions is measured with a text that a cache could hold."""
    lengths: list[int] = []

    def run_out(token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        lengths.append(int(positions_T.max()) + 1)
        if lengths[-1] > 96:
            raise torch.OutOfMemoryError("no room for that")
        return torch.zeros(token_ids_T.shape[0], config.model.hidden_size)

    block = block_bytes(config.model, block_size=config.options.block_size, dtype=config.dtype)
    endless = replace(config, max_model_len=2**40)
    monkeypatch.setattr(CpuDevice, "memory", lambda self: DeviceMemory(0, 100 * block))
    monkeypatch.setattr(engine.runner.model, "forward", run_out)
    with raises(OptionError, "1504", option="max_num_batched_tokens", value=96, remedy="max_model_len"):
        measure(engine, endless)
    assert lengths == [96, 1600]


def test_on_the_cpu_the_size_is_known_before_anything_runs(config: ResolvedConfig) -> None:
    assert config.cache is not None
    assert config.cache.source == "the default for CPUs"
    asked = replace(config.options, kv_cache_memory=2**20).resolve()
    assert asked.cache is not None
    assert asked.cache.source == "set by kv_cache_memory"
    assert asked.cache.num_blocks == 2**20 // block_bytes(config.model, block_size=16, dtype=torch.float32)
