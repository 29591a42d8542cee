"""`antiphon bench overlap` on two CPU ranks: what it prints, that arms differ as they must, and that it can fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.bench.overlap.rank import ARMS, measure_steps, relative_errors, use_transport
from antiphon.bench.overlap.steps import OutputsDiffer, OverlapOptions, check_outputs, summarize_steps
from antiphon.bench.parts import TransportPart, part_of
from antiphon.comm import ExpertShape, OptionError, RankGroup, Routes, Transport, create_transport
from antiphon.comm.slab.shared_memory import SharedMemoryTransport
from antiphon.core.bundled import bundled_model
from antiphon.models import build_model, expert_shape, read_config
from antiphon.models.moe import Experts
from antiphon.runtime import CpuStreams
from tests.support.errors import raises

FIGURES = (
    "serial_over_dual",
    "best_serial_over_dual",
    "split_penalty_ms",
    "excess_ms",
    "recovered",
    "overlap_efficiency",
    "roofline_attainment",
)


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "antiphon.cli", "bench", "overlap", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.processes
def test_steps_are_measured_over_every_transport(tmp_path: Path) -> None:
    slow = "simulated:alltoall:200MB/s:40ms"
    names = ["allgather", "alltoall", slow]
    arguments = ["--transports", ",".join(names), "--tokens", "64,128", "--seq-len", "48", "--repeats", "3"]
    ended = run_bench(*arguments, "--num-layers", "2", "--json", str(tmp_path / "result.json"))
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["model"]["layers"] == 2
    assert result["options"]["routing"] == "uniform"
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["devices"]) == 2
    assert [step["tokens"] for step in result["results"]] == [64, 128]
    for step in result["results"]:
        assert list(step["transports"]) == names
        serial_ms = {name: cell["ms"]["S"]["median"] for name, cell in step["transports"].items()}
        assert serial_ms[step["best_serial"]] == min(serial_ms.values())
        for cell in step["transports"].values():
            assert set(cell["ms"]) == set(ARMS)
            assert all(len(cell["repeats_ms"][arm]) == 3 and min(cell["repeats_ms"][arm]) > 0 for arm in ARMS)
            assert set(FIGURES) <= set(cell)
            assert all(host > 0 for host in cell["host_us_a_layer_and_lane"].values())
            for errors in cell["errors"].values():
                assert 0 <= errors["whole"] <= errors["worst_token"] < 1e-4
        # Two phases of one layer with experts, 40 ms each: in every arm but those of the computation alone.
        slow_ms = {arm: summary["min"] for arm, summary in step["transports"][slow]["ms"].items()}
        assert all((slow_ms[arm] > 80) == (arm in ("S", "M", "D")) for arm in ARMS), slow_ms
    assert all(name[:20] in ended.stderr for name in names)  # the table


def test_a_transport_that_loses_a_token_fails_the_bench() -> None:
    wrong = "tests.bench.rank_functions:ForgetsOneToken"
    options = OverlapOptions(
        model="tiny-deepseek",
        ranks=1,
        device="cpu",
        tokens=[64],
        transports=["local", wrong],
        routing="uniform",
        dtype="float32",
        num_layers=2,
        seq_len=48,
        micro_batches=2,
        repeats=1,
        seed=0,
        peer_access=True,
        timeout_s=10,
    )
    measured = measure_steps(RankGroup(rank=0, size=1), torch.device("cpu"), asdict(options))
    result = {"options": asdict(options), "results": summarize_steps([measured["steps"]], options, num_layers=2)}
    errors = result["results"][0]["transports"][wrong]["errors"]
    assert errors["S"]["worst_token"] < 1e-4 < errors["D"]["worst_token"]
    with raises(OutputsDiffer) as raised:
        check_outputs(result)
    assert (64, wrong, "D") in raised.error.value


def made_up(*, whole: float | None, worst: float | None, routing: str = "uniform") -> dict[str, Any]:
    right = {"whole": 0.0, "worst_token": 0.0}
    errors = {"S": right, "D": {"whole": whole, "worst_token": worst}}
    step = {"tokens": 512, "transports": {"alltoall": {"errors": errors}}}
    return {"options": {"dtype": "bfloat16", "routing": routing}, "results": [step]}


def test_rounding_passes_and_errors_are_named() -> None:
    check_outputs(made_up(whole=0.02, worst=0.1))
    for whole, worst in ((0.02, 0.9), (0.2, 0.3), (None, None)):
        with raises(OutputsDiffer, value=[(512, "alltoall", "D")]):
            check_outputs(made_up(whole=whole, worst=worst))


def test_single_tokens_may_differ_by_the_routing_of_the_model() -> None:
    check_outputs(made_up(whole=0.02, worst=0.9, routing="model"))
    with pytest.raises(OutputsDiffer):
        check_outputs(made_up(whole=0.4, worst=0.9, routing="model"))


def test_relative_errors() -> None:
    expected_TD = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    whole, worst = relative_errors(expected_TD + torch.tensor([[0.0, 0.0], [3.0, 4.0]]), expected_TD)
    assert whole == pytest.approx(5 / math.sqrt(125))
    assert worst == pytest.approx(0.5)
    assert relative_errors(expected_TD * math.nan, expected_TD) == (math.inf, math.inf)


def test_a_part_needs_a_whole_exchange_first() -> None:
    shape = ExpertShape(num_experts=4, top_k=2, hidden_size=8, dtype=torch.float32)
    group = RankGroup(rank=0, size=1)
    whole = SharedMemoryTransport(shape, group=group, streams=CpuStreams(), num_lanes=1, max_tokens=8)

    def exchange(transport: Transport, num_tokens: int) -> torch.Tensor:
        ids_TK = torch.tensor([[0, 1]]).expand(num_tokens, -1)
        routes = Routes(ids_TK, torch.ones(num_tokens, 2))
        rows = transport.dispatch(torch.ones(num_tokens, 8), routes, tokens_by_rank=(num_tokens,)).wait()
        return transport.combine(rows.x_RD.clone()).wait()

    for part in (TransportPart.COMPUTE_ONLY, TransportPart.LINK_ONLY):
        with raises(OptionError, "3 tokens", "none"):
            exchange(part_of(whole, part), 3)
    assert exchange(part_of(whole, TransportPart.WHOLE), 3).shape == (3, 8)
    for part in (TransportPart.COMPUTE_ONLY, TransportPart.LINK_ONLY):
        assert exchange(part_of(whole, part), 3).shape == (3, 8)
        with raises(OptionError, "2 tokens", "3 tokens"):
            exchange(part_of(whole, part), 2)


def test_only_transports_made_of_steps_have_parts() -> None:
    class Own(Transport):
        name = "own"

        def send_tokens(self, *arguments: Any) -> Any: ...

        def send_partials(self, *arguments: Any) -> Any: ...

    shape = ExpertShape(num_experts=4, top_k=2, hidden_size=8, dtype=torch.float32)
    own = Own(shape, group=RankGroup(rank=0, size=1), streams=CpuStreams(), num_lanes=1)
    assert part_of(own, TransportPart.WHOLE) is own
    with raises(OptionError, option="transport", value="own", remedy="alltoall"):
        part_of(own, TransportPart.LINK_ONLY)


def test_one_model_serves_all_transports() -> None:
    config = read_config(bundled_model(), num_layers=3)
    shape, group = expert_shape(config, torch.float32), RankGroup(rank=0, size=1)
    first, second = (
        create_transport("local", shape, group=group, streams=CpuStreams(), num_lanes=1, max_tokens=8) for _ in range(2)
    )
    model = build_model(config, first)
    use_transport(model, second)
    used = [module.transport for module in model.modules() if isinstance(module, Experts)]
    assert len(used) == 2 and all(transport is second for transport in used)
