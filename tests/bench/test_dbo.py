"""`antiphon bench dbo`: runs are interleaved, with equal sizes and other prompts, and steps are split as reported."""

from __future__ import annotations

import asyncio
import io
import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console
from typer.testing import CliRunner

from antiphon.bench.dbo import DboOptions, _run, print_dbo, run_dbo
from antiphon.bench.serve.workload import Workload
from antiphon.cli import app, demo
from antiphon.config.engine_config import EngineConfig
from antiphon.core.errors import OptionError, PromptLengthError
from tests.support.errors import raises
from tests.support.processes import assert_no_new_workers, worker_pids

SMALL = Workload(num_prompts=4, input_len=40, output_len=3, range_ratio=0.5)


def runs_of(options: DboOptions) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    before = worker_pids()
    result = run_dbo(EngineConfig(ranks=2), options, say=said.append)
    assert_no_new_workers(before)
    return result, said


@pytest.mark.processes
def test_what_auto_chose_is_said_before_it_is_measured() -> None:
    result, said = runs_of(DboOptions(workload=SMALL, repeats=1, modes=("off", "auto")))
    (chosen,) = [line for line in said if line.startswith("dbo auto: off: ")]
    assert chosen.endswith("too small a part of a step to be worth hiding")
    assert result["steps_by_plan"]["auto"].keys() == {"serial"}


@pytest.mark.processes
def test_off_and_on_by_turns_in_one_engine() -> None:
    result, said = runs_of(DboOptions(workload=SMALL, repeats=2, capacity_share=1.5))
    json.dumps(result, allow_nan=False)
    turns = [line.split(":")[0] for line in said if line.startswith("dbo ")]
    assert turns == ["dbo off", "dbo on", "dbo on", "dbo off", "dbo off", "dbo on"]
    assert set(result["steps_by_plan"]["off"]) == {"serial"} and result["steps_by_plan"]["on"]["dual"] > 0
    assert result["serial_reasons"]["off"].keys() == {"dbo is off"}
    assert [len(result["runs"][mode]) for mode in ("off", "on")] == [2, 2]
    assert all(run["cached_tokens"] == 0 for made in result["runs"].values() for run in made)
    # The same sizes in every run: tokens a request are the same.
    sizes = {
        round(run["total_token_throughput"] / run["request_throughput"], 6)
        for made in result["runs"].values()
        for run in made
    }
    assert len(sizes) == 1
    off, on = result["runs"]["off"], result["runs"]["on"]
    ratios = sorted(b["mean_ttft_ms"] / a["mean_ttft_ms"] for a, b in zip(off, on, strict=True))
    told = result["ratios"]["on"]["mean_ttft_ms"]
    assert [told["min"], told["max"]] == pytest.approx(ratios)
    assert isinstance(result["options"]["request_rate"], float) and result["options"]["vocab_size"] == 4096
    stream = io.StringIO()
    print_dbo(result, Console(file=stream, width=140))
    assert "mean TTFT" in stream.getvalue() and "on / off" in stream.getvalue()
    assert "says nothing about overlap" not in stream.getvalue()
    result["steps_by_plan"]["on"] = {"serial": 8}
    print_dbo(result, Console(file=stream, width=140))
    assert "no step of dbo on was split, so this run says nothing about overlap" in stream.getvalue()


@pytest.mark.processes
def test_a_load_that_does_not_fit_ends_with_one_error() -> None:
    with raises(PromptLengthError, "4096", option="prompts"):
        runs_of(DboOptions(workload=Workload(num_prompts=2, input_len=5000, output_len=1), repeats=1))


@pytest.mark.parametrize(
    ("wrong", "option", "name"),
    [
        ({"modes": ("off", "onn")}, "modes", "'on'"),
        ({"modes": ("off",)}, "modes", "off"),
        ({"capacity_share": 0.0}, "capacity-share", "0"),
        ({"capacity_share": 1.2, "request_rate": 3.0}, "capacity-share", "1.2"),
        ({"capacity_share": float("nan")}, "capacity-share", "nan"),
        ({"request_rate": -1.0}, "request-rate", "-1"),
        ({"burstiness": 0.0}, "burstiness", "0"),
        ({"burstiness": 1e-300, "request_rate": 3.0}, "burstiness", "1e-300"),
        ({"burstiness": 1e-300, "capacity_share": 0.5}, "burstiness", "1e-300"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], option: str, name: str) -> None:
    with raises(OptionError, name, option=option):
        DboOptions(**wrong)


def test_the_engine_is_closed_if_the_load_cannot_be_made_for_it() -> None:
    called: list[str] = []

    async def close() -> None:
        called.append("close")

    config = SimpleNamespace(model=SimpleNamespace(vocab_size=10))
    engine: Any = SimpleNamespace(config=config, attach=lambda: called.append("attach"), close=close)
    with raises(OptionError, "10", option="random-vocab-size"):
        asyncio.run(_run(engine, DboOptions(), called.append))
    assert called == ["attach", "close"]


def test_the_table_names_the_model_as_it_is() -> None:
    result = {
        "model": "/models/:rocket:/glm[fp8]",
        "ranks": 2,
        "transport": "alltoall",
        "options": {"repeats": 1},
        "figures": {"off": defaultdict(lambda: {"median": 1.0, "min": 1.0, "max": 1.0})},
        "ratios": {},
        "steps_by_plan": {"off": {"serial": 1}},
        "serial_reasons": {"off": {"[x] :rocket:": 1}},
    }
    stream = io.StringIO()
    print_dbo(result, Console(file=stream, width=140))
    assert "/models/:rocket:/glm[fp8], 2 ranks" in stream.getvalue() and "[x] :rocket:: 1)" in stream.getvalue()


def test_the_demo_does_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        """Raised in place of the work."""

    llm = MagicMock()
    llm.return_value.__enter__.return_value.generate.side_effect = StoppedError
    llm.return_value.__exit__.return_value = False
    monkeypatch.setattr(demo, "LLM", llm)
    monkeypatch.setattr(demo, "tuned_link", lambda *_: None)
    monkeypatch.setattr(demo, "simulated_transport", lambda _: "")
    monkeypatch.setattr(demo, "describe_config", lambda _: [("model", "/models/:rocket:/glm[fp8]")])
    stream = io.StringIO()
    with pytest.raises(StoppedError):
        demo.run_demo(Console(file=stream))
    assert "  model:     /models/:rocket:/glm[fp8]\n" in stream.getvalue()


def test_the_command_refuses_the_option_that_it_varies() -> None:
    done = CliRunner().invoke(app, ["bench", "dbo", "--dbo", "on"])
    assert isinstance(done.exception, OptionError) and "--modes" in str(done.exception)
