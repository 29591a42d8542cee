"""Overlap from a first to a last layer: these run in lanes, the others unsplit, and the result does not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon import LLM, SamplingParams
from antiphon.comm import RankGroup
from antiphon.core.batch import Batch, current_micro_batch
from antiphon.core.plan import Plan
from antiphon.engine.runner import Runner
from antiphon.models.decoder import DecoderLayer
from antiphon.runtime import CpuStreams, EventKind, LaneEvent, current_lane, num_lanes
from antiphon.splitting import split
from tests.engine.layer_checks import NUM_LAYERS, PARTS, RANGES, mixed_requests, results_of_rank, run_step
from tests.models.twin import BLOCK_SIZE, Twin, random_checkpoint
from tests.support.prompts import mixed_prompts
from tests.support.ranks import run_ranks

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"num_hidden_layers": NUM_LAYERS, "first_k_dense_replace": 2},
    "qwen3-moe": {"num_hidden_layers": NUM_LAYERS},
}
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
ONE_RANK = [((9, 10),), ((1, 18),), ((0, 19),), ((3, 9, 7),)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, changes in CONFIGS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        random_checkpoint(made[kind], kind=kind, **changes)
    return made


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def twin(folder: Path) -> Twin:
    return Twin.load(None, folder)


def assert_equal_to_the_first(of_case: list[tuple[torch.Tensor, torch.Tensor]], limit: float) -> None:
    expected_TD, expected_cache = of_case[0]
    assert len(of_case) == 1 + len(RANGES)
    for layers, (hidden_TD, cache) in zip(RANGES, of_case[1:], strict=True):
        assert hidden_TD.shape == expected_TD.shape
        if expected_TD.shape[0]:
            assert relative_error(hidden_TD, expected_TD) < limit, layers
        assert relative_error(cache, expected_cache) < limit, layers


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_one_rank_equals_the_unsplit_step(folder: Path, dtype: torch.dtype) -> None:
    results = results_of_rank(RankGroup(rank=0, size=1), folder, "auto", dtype, ONE_RANK)
    for of_case in results:
        assert_equal_to_the_first(of_case, LIMITS[dtype])


@pytest.mark.processes
@pytest.mark.parametrize(
    "ways",
    [
        [("alltoall", torch.float64), ("shared-memory", torch.float32)],
        pytest.param([("alltoall", torch.float32), ("allgather", torch.float64)], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_the_unsplit_step(folders: dict[str, Path], ways: list[tuple[str, torch.dtype]]) -> None:
    jobs = [(folder, *way) for folder in folders.values() for way in ways]
    for rank, results_of_jobs in enumerate(run_ranks("tests.engine.layer_checks:results_of_jobs", 2, jobs)):
        for (_, _, dtype), results in zip(jobs, results_of_jobs, strict=True):
            for part_tokens, of_case in zip(PARTS, results, strict=True):
                assert of_case[0][0].shape[0] == sum(part_tokens[rank])
                assert_equal_to_the_first(of_case, LIMITS[dtype])


@pytest.mark.parametrize("layers", RANGES, ids=str)
def test_which_layers_run_in_lanes(twin: Twin, layers: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int, int]] = []
    forward = DecoderLayer.forward

    def noted(self: DecoderLayer, x_TD: torch.Tensor, *rest: Any) -> Any:
        assert x_TD.shape[0] == current_micro_batch().num_tokens
        assert current_micro_batch().lane == current_lane()
        calls.append((self.self_attn.layer, num_lanes(), current_lane(), x_TD.shape[0]))
        return forward(self, x_TD, *rest)

    monkeypatch.setattr(DecoderLayer, "forward", noted)
    monkeypatch.setattr(twin.ours, "_angles_P", None)
    twin.empty_cache()
    run_step(twin, mixed_requests(seed=0), ((9, 10),), layers)
    in_lanes = range(NUM_LAYERS)[layers]
    before = [(layer, 1, 0, 19) for layer in range(in_lanes.start)]
    after = [(layer, 1, 0, 19) for layer in range(in_lanes.stop, NUM_LAYERS)]
    middle = calls[len(before) : len(calls) - len(after)]
    assert calls == before + middle + after
    assert sorted(middle) == [(layer, 2, lane, (9, 10)[lane]) for layer in in_lanes for lane in range(2)]


def test_the_other_layers_know_the_tokens_of_all_ranks() -> None:
    batch = Batch(rank=1, requests=mixed_requests(seed=0))
    plan = Plan(part_tokens=((5, 6, 0), (9, 0, 10), (0, 0, 0)), reason="test")
    (whole,) = split(batch, plan.unsplit(), block_size=BLOCK_SIZE)
    assert (whole.lane, whole.rows_by_rank) == (0, (11, 19, 0))
    parts = split(batch, plan, block_size=BLOCK_SIZE)
    for name in ("token_ids_T", "positions_T"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.attention.slots_T for part in parts]), whole.attention.slots_T)
    (idle,) = split(Batch(rank=2, requests=()), plan.unsplit(), block_size=BLOCK_SIZE)
    assert (idle.num_tokens, idle.rows_by_rank) == (0, (11, 19, 0))


def test_some_layers_need_the_whole(twin: Twin) -> None:
    batch, plan = Batch(rank=0, requests=mixed_requests(seed=0)), Plan(part_tokens=((9, 10),), reason="test")
    parts = split(batch, plan, block_size=BLOCK_SIZE)
    with pytest.raises(AssertionError, match=r"range\(1, \d+\)"):
        Runner(twin.ours, streams=twin.streams).run(parts, layers=slice(1, None))


class SpiedStreams(CpuStreams):
    def __init__(self) -> None:
        super().__init__()
        self.left_free: list[int] = []

    @contextmanager
    def leave_free(self, num_sms: int) -> Iterator[None]:
        self.left_free.append(num_sms)
        yield


class Events:
    def __init__(self) -> None:
        self.kinds: list[tuple[EventKind, int]] = []

    def on_event(self, event: LaneEvent) -> None:
        self.kinds.append((event.kind, event.lane))


def test_only_the_lanes_switch_and_leave_sms_free(twin: Twin) -> None:
    streams, events = SpiedStreams(), Events()
    runner = Runner(twin.ours, streams=streams, recorder=events)
    runner.reserved_sms = 7
    batch, plan = Batch(rank=0, requests=mixed_requests(seed=0)), Plan(part_tokens=((9, 10),), reason="test")
    parts = split(batch, plan, block_size=BLOCK_SIZE)
    (whole,) = split(batch, plan.unsplit(), block_size=BLOCK_SIZE)
    twin.empty_cache()
    runner.run(parts, whole=whole, layers=slice(2, 3))
    assert streams.left_free == [7]  # by the split layers alone
    switches = sum(kind is EventKind.SWITCH_OUT for kind, _ in events.kinds)
    assert switches == 2 * 2  # dispatch and combine of one MoE layer on two lanes
    assert sum(kind is EventKind.SENT for kind, _ in events.kinds) == 2 * _moe_layers(twin) + 2
    streams.left_free.clear()
    runner.run([whole], layers=slice(2, 3))
    assert streams.left_free == []


def _moe_layers(twin: Twin) -> int:
    return sum(hasattr(layer.mlp, "experts") for layer in twin.ours.decoder_layers())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "in_lanes"),
    [({"dbo_start_layer": 1}, {1, 2, 3, 4, 5}), ({"dbo_start_layer": 2, "dbo_end_layer": 4}, {2, 3})],
    ids=str,
)
def test_the_options_of_the_engine(two_ranks: LLM, options: dict[str, int], in_lanes: set[int]) -> None:
    """The bundled model: one dense layer, then five of experts, which switch if they run in lanes."""
    prompts, params = mixed_prompts(12), SamplingParams(max_tokens=6, ignore_eos=True)
    two_ranks.reconfigure(dbo="off", split="token")
    expected = [output.token_ids for output in two_ranks.generate(prompts, params)]
    with LLM(ranks=2, transport="alltoall", dbo="on", debug_order=True, **options) as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.stats()["steps_by_plan"]["serial"] == 0
        timelines = llm.timelines()
    assert len(timelines) == 2
    for step in (step for timeline in timelines for step in timeline):
        assert step.kind == "dual"
        exchanges = [event.label for event in step.events if event.kind is EventKind.SENT]
        switches = [event.label for event in step.events if event.kind is EventKind.SWITCH_OUT]
        for layer in range(1, 6):
            label = f"dispatch layer {layer}"
            assert exchanges.count(label) == (2 if layer in in_lanes else 1)
            assert switches.count(label) == (2 if layer in in_lanes else 0)
