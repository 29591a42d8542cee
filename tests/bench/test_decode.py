"""`antiphon bench decode` on the CPU: every plan is the one that was asked for, and the figures are right by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from antiphon.bench.decode.cells import print_decode, summarize_cells
from antiphon.bench.decode.floor import ModelBytes, chosen_share, copy_bandwidth, step_bytes
from antiphon.bench.decode.kernels import KernelRun, kernel_runs, kernel_table
from antiphon.bench.decode.options import DecodeOptions
from antiphon.bench.decode.rank import Bench, Cell, measure_decode
from antiphon.cli import app
from antiphon.comm import RankGroup
from antiphon.config.cache import block_bytes
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import OptionError
from antiphon.device.table import find_device
from antiphon.engine.build import build_engine
from antiphon.engine.step import StepEngine
from antiphon.models import read_config, weight_bytes
from antiphon.models.build import skeleton
from tests.support.errors import raises

ALONE = RankGroup(rank=0, size=1)
SMALL = DecodeOptions(
    model="tiny-deepseek",
    ranks=1,
    device="cpu",
    sequences=[1, 3],
    contexts=[20],
    plans=["serial", "dual", "eager"],
    steps=2,
    repeats=1,
    kernels=0,
    transport="auto",
    routing="uniform",
    dtype="auto",
    num_layers=2,
    seed=0,
    peer_access=True,
    timeout_s=30,
)
MADE_UP = ModelBytes(
    layers=1000,
    head=200,
    expert=10,
    cached_token=4,
    num_local_experts=4,
    num_experts=8,
    top_k=2,
    num_moe_layers=3,
)


def test_the_bytes_of_a_step_by_hand() -> None:
    serial = step_bytes(MADE_UP, sequences=1, context=100, num_ranks=2, num_lanes=1)
    # Two tokens miss an expert with (6 / 8) ** 2, so 0.4375 of 4 local experts of 10 bytes in 3 layers are read.
    assert (serial.layers, serial.head, serial.cache) == (1000, 200, 400)
    assert serial.experts == pytest.approx(52.5)
    assert serial.total == pytest.approx(1652.5)
    dual = step_bytes(MADE_UP, sequences=3, context=100.5, num_ranks=2, num_lanes=2)
    # Lanes of 2 and 1 sequences on each rank: 4 and 2 tokens. The head runs once, over both lanes.
    assert (dual.layers, dual.head, dual.cache) == (2000, 200, 1206)
    assert dual.experts == pytest.approx((1 - 0.75**4 + 0.4375) * 120)


def test_the_share_of_chosen_experts_is_that_of_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    draws_NE = torch.rand(4000, 5, 16, generator=generator)  # 5 tokens of 16 experts
    chosen = draws_NE.topk(3, dim=-1).indices
    hit_NE = torch.zeros(4000, 16).scatter_(1, chosen.flatten(1), 1.0)
    assert chosen_share(5, num_experts=16, top_k=3) == pytest.approx(float(hit_NE.mean()), abs=0.01)


@pytest.mark.parametrize(("name", "tied"), [(bundled_model(), True), ("qwen3-30b-a3b", False)])
def test_the_bytes_of_a_model_are_all_of_its_weights(name: Path | str, tied: bool) -> None:
    config = read_config(name, num_layers=3)
    model = skeleton(config, torch.bfloat16)
    found = ModelBytes.of(model, kv_itemsize=2)
    experts = found.expert * found.num_local_experts * found.num_moe_layers
    embedding = 0 if tied else found.head  # of the same shape, and not read as a whole
    buffers = sum(tensor.nbytes for tensor in model.buffers())
    assert found.layers + found.head + embedding + experts + buffers == weight_bytes(config, torch.bfloat16, 1)
    assert found.expert == 3 * config.hidden_size * config.expert_width * 2
    assert (found.num_local_experts, found.num_experts, found.top_k) == (config.num_experts,) * 2 + (config.top_k,)
    assert found.cached_token == block_bytes(config, block_size=1, dtype=torch.bfloat16)


def test_the_bandwidth_of_copies_is_that_of_memory() -> None:
    assert 1e8 < copy_bandwidth(find_device("cpu"), 2**22) < 1e13


def test_the_kernels_of_a_step() -> None:
    # Two steps; `b` runs beside `a` on another stream, and nothing runs from 8 to 10 and from 18 to 19.
    runs = [
        KernelRun("a", 0.0, 6.0),
        KernelRun("b", 2.0, 8.0),
        KernelRun("a", 10.0, 16.0),
        KernelRun("b", 12.0, 18.0),
        KernelRun("copy", 19.0, 20.0),
    ]
    table = kernel_table(runs, num_steps=2, most=2)
    assert [(line.name, line.calls, line.us) for line in table.lines] == [("a", 1.0, 6.0), ("b", 1.0, 6.0)]
    assert table.lines[0].share == pytest.approx(12 / 25)
    assert (table.num_kernels, table.calls, table.all_us, table.gap_us) == (3, 2.5, 12.5, 1.5)


def test_only_what_runs_on_the_device_is_a_kernel() -> None:
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 5.0, "dur": 2.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 8.0, "dur": 1.0},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1.0, "dur": 3.0},
        {"cat": "gpu_user_annotation", "name": "nccl:all_reduce", "ts": 5.0, "dur": 9.0},
        {"ph": "M", "name": "process_name"},
    ]
    assert kernel_runs(events) == [KernelRun("gemm", 5.0, 7.0), KernelRun("Memcpy HtoD", 8.0, 9.0)]


def test_one_rank_runs_every_plan() -> None:
    measured = measure_decode(ALONE, torch.device("cpu"), asdict(SMALL))
    cells = {(cell["sequences"], cell["plan"]): cell for cell in measured["cells"]}
    assert list(cells) == [(number, plan) for number in (1, 3) for plan in SMALL.plans]
    assert cells[1, "dual"]["not_run"].endswith("fewer tokens than lanes")
    ran = {place: cell for place, cell in cells.items() if place != (1, "dual")}
    assert {place: cell["launch"] for place, cell in ran.items()} == {
        place: "eager" if place[1] == "eager" else "padded" for place in ran
    }
    assert all(not cell["not_run"] and len(cell["ms"]) == 1 and cell["ms"][0] > 0 for cell in ran.values())
    # With 3 sequences: 1 step of prefill, a warm-up in which serial, dual and eager run 2 + 2, 2 + 2 and 2 + 4 steps,
    # and then the same in the reverse order. The text has its prompt and the token of the prefill before that.
    begins = {"eager": 14 + 2, "dual": 14 + 6 + 2, "serial": 14 + 10 + 2}
    steps = {"eager": 4, "dual": 2, "serial": 2}
    for plan, begin in begins.items():
        assert cells[3, plan]["contexts"] == [20 + 1 + begin + (steps[plan] - 1) / 2], plan
    results = summarize_cells([measured], SMALL)
    for cell in results:
        if "not_run" not in cell:
            expected = sum(cell["bytes"].values()) / measured["copy_bytes_per_s"] * 1e3
            assert cell["floor_ms"] == pytest.approx(expected)
            assert cell["of_floor"] == pytest.approx(expected / cell["ms"]["median"])
            assert cell["device_ms"] is None and cell["idle_ms"] is None and cell["kernels"] is None
    unknown = summarize_cells([measured], replace(SMALL, routing="zipf:1.2"))
    assert all(cell["floor_ms"] is None for cell in unknown if "not_run" not in cell)


def bench_of(engine: StepEngine, options: DecodeOptions) -> Bench:
    return Bench(engine, options, vocab_size=4096)


def test_a_plan_that_does_not_come_about_is_not_reported() -> None:
    options = replace(SMALL, sequences=[2])
    engine = build_engine(options.resolve(), ALONE)
    engine.planner.ladders = {1: (1,)}
    serial, dual, eager = bench_of(engine, options).measure(2, 20)
    assert serial.not_run == "not padded: more sequences than the largest size" and not serial.ms
    assert dual.not_run.startswith("not padded: ") and not dual.ms
    assert not eager.not_run and eager.ms
    assert not engine.scheduler.requests and engine.planner.ladders == {1: (1,)}


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_replays_between_steps_change_no_text(runs_ahead: bool) -> None:
    """On a CPU nothing is captured, but the padded step is the same function."""
    options = replace(SMALL, sequences=[2], plans=["serial"])
    texts = []
    for replays in (False, True):
        engine = build_engine(options.resolve(), ALONE)
        if runs_ahead:  # as on a device that queues its work
            assert engine.padded is not None
            engine.sampler.new_tokens = engine.padded._new_tokens
        bench, cell = bench_of(engine, options), Cell(sequences=2, context_len=20, plan="serial")
        requests = bench._requests(2, 20)
        bench._prefill(requests)
        for _ in range(2):
            bench._run(cell, requests, counts=True)
            if replays:
                bench._replay(cell)
        assert cell.launch == "padded" and not cell.not_run and len(cell.ms) == 2
        assert (cell.device_ms or 0) > 0 if replays else cell.device_ms is None
        texts.append([request.output_ids for request in requests])
        assert all(len(request.output_ids) == 1 + 2 * 4 for request in requests)
    assert texts[0] == texts[1] and len({*map(tuple, texts[0])}) == 2


@pytest.mark.parametrize("fails_after_the_run", [False, True])
def test_a_profiler_that_fails_costs_only_its_table(
    fails_after_the_run: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Peers run the replays in any case, so this rank must too, once."""

    def profile(run: Callable[[], None]) -> list[KernelRun]:
        if fails_after_the_run:
            run()
        raise RuntimeError("the profiler is missing")

    monkeypatch.setattr("antiphon.bench.decode.rank.profile_kernels", profile)
    options = replace(SMALL, sequences=[2], plans=["serial"], kernels=3)
    engine = build_engine(options.resolve(), ALONE)
    assert engine.padded is not None
    bench, cell = bench_of(engine, options), Cell(sequences=2, context_len=20, plan="serial")
    bench._prefill(bench._requests(2, 20))
    batch = engine.scheduler.next_batch()
    plan = engine.planner.agree(batch, ALONE)
    before = engine.padded._inputs._num_fills
    bench._profile(cell, batch, plan)
    assert cell.kernels is None and "the profiler is missing" in capsys.readouterr().err
    assert engine.padded._inputs._num_fills == before + 5


def test_texts_that_do_not_fit_into_the_cache_are_not_run() -> None:
    options = replace(SMALL, sequences=[3])
    config = options.resolve()
    engine = build_engine(replace(config.options, kv_cache_memory=60_000).resolve(), ALONE)
    num_blocks = engine.scheduler.pool.num_usable
    cells = bench_of(engine, options).measure(3, 20)
    assert all(str(num_blocks) in cell.not_run and "blocks" in cell.not_run for cell in cells)
    assert not engine.scheduler.requests and engine.stats.num_steps == 0


def test_captured_cells_have_their_time_on_the_device() -> None:
    """The slowest rank's, and what the host adds to it."""
    cell = {"context_len": 20, "sequences": 2, "plan": "serial", "not_run": "", "launch": "captured"}
    table = kernel_table([KernelRun("gemm", 0.0, 900.0)], num_steps=1, most=10).to_dict()
    both = [
        {**cell, "ms": [5.0, 4.0, 6.0], "contexts": [30.0, 40.0, 50.0], "device_ms": 3.0, "kernels": table},
        {**cell, "ms": [4.0, 4.5, 5.0], "contexts": [30.0, 40.0, 50.0], "device_ms": 3.5, "kernels": None},
    ]
    results = [
        {"cells": [one], "copy_bytes_per_s": speed, "model_bytes": asdict(MADE_UP)}
        for one, speed in zip(both, (2e6, 1e6), strict=True)
    ]
    (found,) = summarize_cells(results, replace(SMALL, ranks=2))
    assert found["repeats_ms"] == [5.0, 4.5, 6.0] and found["ms"] == {"median": 5.0, "min": 4.5, "max": 6.0}
    assert (found["device_ms"], found["idle_ms"], found["context"]) == (3.5, 1.5, 40.0)
    moved = step_bytes(MADE_UP, sequences=2, context=40.0, num_ranks=2, num_lanes=1)
    assert found["floor_ms"] == pytest.approx(moved.total / 1e6 * 1e3)
    printed = io.StringIO()
    print_decode(made_up_result([found], kernels=10), Console(file=printed, width=160))
    for text in ("5.00", "4.50 to 6.00", "3.50", "1.50", "gemm", "900.0", "100.0%"):
        assert text in printed.getvalue(), text


def made_up_result(results: list[dict[str, Any]], *, kernels: int) -> dict[str, Any]:
    return {
        "model": {"name": "made[up]", "layers": 2},
        "options": {"routing": "uniform", "repeats": 3, "contexts": [20], "kernels": kernels},
        "dtype": "bfloat16",
        "devices": ["a card"] * 2,
        "transport": "copy-engine",
        "data_path": "peer",
        "copy_gb_per_s": 3000.0,
        "graphs": {"obstacle": ""},
        "results": results,
    }


@pytest.mark.processes
def test_two_ranks_print_a_table_and_one_object(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--ranks", "2", "--sequences", "2", "--context", "20,30", "--steps", "4"]
    arguments += ["--repeats", "1", "--num-layers", "2", "--kernels", "3", "--json", str(tmp_path / "result.json")]
    command = [sys.executable, "-m", "antiphon.cli", "bench", "decode", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert {"date", "devices", "versions", "model", "transport", "data_path", "dtype", "graphs"} <= set(result)
    assert len(result["devices"]) == 2 and result["dtype"] == "float32" and result["model"]["layers"] == 2
    assert result["options"]["routing"] == "uniform" and result["options"]["repeats"] == 1
    places = [(cell["context_len"], cell["plan"], cell["launch"]) for cell in result["results"]]
    assert places == [
        (context, plan, "eager" if plan == "eager" else "padded") for context in (20, 30) for plan in SMALL.plans
    ]
    assert all(cell["context"] > cell["context_len"] for cell in result["results"])
    for text in ("context 20", "context 30", "serial", "dual", "work on cpu cannot be captured", "no kernel tables"):
        assert text in ended.stderr, text


def test_a_context_must_leave_room_for_the_steps() -> None:
    room = SMALL.room(3, 4096)
    with raises(OptionError, "4096", option="context", value=4096, remedy=str(4096 - room)) as raised:
        replace(SMALL, contexts=[20, 4096]).resolve()
    assert str(room) in raised.error.limit
    assert replace(SMALL, contexts=[4096 - room]).resolve().max_model_len == 4096
    with raises(OptionError, option="context", remedy="--steps"):
        replace(SMALL, steps=5000).resolve()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--sequences", "0"], ["--sequences", "at least 1"]),
        (["--plans", "serial,duall"], ["duall", "dual"]),
        (["--context", "1k,5k"], ["--context 5000", "4096"]),
        (["--transport", "alltoal"], ["alltoal", "alltoall"]),
    ],
)
def test_what_cannot_be_is_refused_before_a_process_starts(arguments: list[str], names: list[str]) -> None:
    ended = CliRunner().invoke(app, ["bench", "decode", "--device", "cpu", *arguments])
    assert ended.exit_code != 0
    assert isinstance(ended.exception, OptionError), ended.exception
    assert all(name in str(ended.exception) for name in names), ended.exception
