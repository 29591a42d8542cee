"""The sizes of padded steps: how they are written, which ladders follow, and what the start-up block says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from antiphon.comm import DataPath
from antiphon.config.cache import CacheSize
from antiphon.config.describe import describe_config
from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.config.graph_sizes import CaptureReport, default_ladder, ladder_up_to, parse_graph_sizes
from antiphon.core.errors import OptionError
from antiphon.core.plan import EagerReason
from antiphon.core.policy import OverlapPolicy
from antiphon.engine.messages import Ready, decode_from_worker, encode
from tests.support.asked import AskedError, run_command, stop_before_start
from tests.support.errors import raises

CPU = "work on cpu cannot be captured"
PROMPTS = EagerReason.PROMPTS.text


def test_the_default_ladder() -> None:
    ladder = list(default_ladder())
    assert ladder[:12] == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80]
    assert ladder[ladder.index(64) : ladder.index(256) + 1] == list(range(64, 257, 16))
    assert ladder[ladder.index(256) :] == list(range(256, 513, 32))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1,2,4", (1, 2, 4)),
        ("4 2, 1", (1, 2, 4)),
        ("3,3", (3,)),
        ("8,", (8,)),
        ("1", (1,)),
        ("8", (1, 2, 4, 8)),
        ("20", (1, 2, 4, 8, 16, 20)),
        ("576", (*default_ladder(), 544, 576)),
    ],
)
def test_how_sizes_are_written(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_graph_sizes(text) == sizes


@pytest.mark.parametrize("wrong", ["", ",", "0", "-1", "1,x", "1.5", "[1", True, 2.5, [1, 0], {"a": 1}])
def test_what_is_no_list_of_sizes_is_refused(wrong: Any) -> None:
    with raises(OptionError, "at least 1", option="cuda_graph_sizes", remedy="1,2,4,8"):
        LLM(cuda_graph_sizes=wrong)


@pytest.mark.parametrize(
    ("sizes", "most", "limit", "ladder"),
    [
        ((1, 2, 4, 8, 16, 24), 9, 100, (1, 2, 4, 8, 16)),
        ((1, 2, 512), 4, 100, (1, 2, 4)),
        ((1, 2, 512), 9, 100, (1, 2, 16)),
        ((1, 2), 9, 100, (1, 2)),
        ((8, 16, 24), 13, 13, (8, 13)),
    ],
)
def test_sizes_are_cut_to_what_is_needed(
    sizes: tuple[int, ...], most: int, limit: int, ladder: tuple[int, ...]
) -> None:
    assert ladder_up_to(sizes, most, limit=limit) == ladder


@pytest.mark.parametrize(
    ("options", "dbo", "ladders"),
    [
        ({}, "on", {}),  # a CPU captures nothing
        ({"cuda_graph_sizes": "1,2,4", "enforce_eager": True}, "on", {}),
        ({"cuda_graph_sizes": "1,2,4"}, "off", {1: (1, 2, 4)}),
        ({"cuda_graph_sizes": "1,2,4"}, "on", {1: (1, 2, 4), 2: (1, 2, 4)}),
        ({"cuda_graph_sizes": "256", "max_num_seqs": 12}, "on", {1: (1, 2, 4, 8, 16), 2: (1, 2, 4, 8)}),
        ({"cuda_graph_sizes": "256", "max_num_batched_tokens": 12}, "off", {1: (1, 2, 4, 8, 12)}),
    ],
)
def test_the_ladders(options: dict[str, Any], dbo: str, ladders: dict[int, tuple[int, ...]]) -> None:
    config = EngineConfig(**options, device="cpu", policy=OverlapPolicy(dbo=dbo)).resolve()
    assert config.ladders == ladders


def test_sizes_without_graphs_have_no_effect_and_say_so() -> None:
    config = EngineConfig(enforce_eager=True, cuda_graph_sizes="1,2").resolve()
    assert config.without_effect() == ["cuda_graph_sizes=1,2 has no effect: enforce_eager is set"]
    assert EngineConfig(cuda_graph_sizes="1,2").resolve().without_effect() == []


# ---- the command line


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["--cuda-graph-sizes", "1,2", "tiny-deepseek"], "1,2"),
        (["--cuda-graph-sizes", "1", "2", "4", "tiny-deepseek"], "1,2,4"),
        (["--cuda_graph_sizes=16", "tiny-deepseek"], "16"),
        (["--cuda-graph-sizes", "[1, 2]"], "1,2"),
        (["--cudagraph-capture-sizes", "1", "2", "tiny-deepseek"], "1,2"),
        (["--cudagraph-capture-sizes", "1", "2", "--max-cudagraph-capture-size", "2"], "1,2"),
        (["--cuda-graph-sizes", "4", "--cuda-graph-max-bs", "2"], "4"),
        (["--cuda-graph-bs=8"], "8,"),
        (["--config", "options.yaml"], "1,2,4"),
        (["--config", "options.yaml", "--cuda-graph-sizes", "8"], "8"),
    ],
)
def test_sizes_on_the_command_line(
    words: list[str], sizes: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop_before_start(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_text("cuda-graph-sizes: [1, 2, 4]\n")
    with pytest.raises(AskedError) as ended:
        run_command(monkeypatch, "generate", "--prompt", "x", *words)
    assert ended.value.config.cuda_graph_sizes == sizes
    assert ended.value.config.model == "tiny-deepseek"


def test_graphs_that_a_file_switches_off_can_be_switched_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stop_before_start(monkeypatch)
    file = tmp_path / "options.yaml"
    file.write_text(json.dumps({"enforce_eager": True, "async_scheduling": False}))
    for words, eager, ahead in (([], True, False), (["--no-enforce-eager", "--async-scheduling"], False, True)):
        with pytest.raises(AskedError) as ended:
            run_command(monkeypatch, "generate", "--prompt", "x", "--config", str(file), *words)
        assert (ended.value.config.enforce_eager, ended.value.config.async_scheduling) == (eager, ahead)


# ---- what the start-up block says


def started(captured: CaptureReport, *, device: str = "cpu", **options: Any) -> ResolvedConfig:
    config = EngineConfig(device=device, **options).resolve()
    cache = CacheSize(num_blocks=100, source="why")
    return config.started(
        device_name="A", transport_name="local", data_path=DataPath.NONE, cache=cache, captured=captured
    )


@pytest.mark.parametrize(
    ("captured", "options", "told"),
    [
        (CaptureReport(obstacle=CPU), {}, None),
        (CaptureReport(obstacle="enforce_eager is set"), {"enforce_eager": True}, "none: enforce_eager is set"),
        (
            CaptureReport(sizes={1: (1, 2, 4)}, obstacle=CPU),
            {"cuda_graph_sizes": "1,2,4", "max_num_seqs": 4},
            f"decode steps are padded to 1, 2, 4 sequences; {CPU}",
        ),
        (
            CaptureReport(sizes={1: (1,)}, obstacle=CPU),
            {"cuda_graph_sizes": "1"},
            f"decode steps are padded to 1 sequence; steps of more sequences are eager; {CPU}",
        ),
        (
            CaptureReport(
                num_graphs=62, time_s=14.21, num_bytes=2 * 2**30, sizes={1: tuple(range(1, 257)), 2: (1, 128)}
            ),
            {},
            "62 decode steps of 1 to 256 sequences, serial and dual, captured in 14.2 s (2 GiB)",
        ),
        (
            CaptureReport(num_graphs=1, time_s=1, num_bytes=2**20, sizes={2: (4,)}),
            {},
            "1 decode step of 8 sequences, dual, captured in 1.0 s (1 MiB); steps of more sequences are eager",
        ),
    ],
)
def test_the_start_up_block_says_what_was_captured(
    captured: CaptureReport, options: dict[str, Any], told: str | None
) -> None:
    config = started(captured, **options)
    assert dict(describe_config(config)).get("graphs") == told


def test_a_device_that_could_capture_says_why_it_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = started(CaptureReport(obstacle="transport alltoall cannot be captured: the host reads counts"))
    monkeypatch.setattr(type(config.device), "capturable", True)
    assert dict(describe_config(config))["graphs"] == (
        "none: transport alltoall cannot be captured: the host reads counts"
    )


def test_the_ranks_report_reaches_the_frontend() -> None:
    ready = Ready(
        device_name="A",
        transport_name="local",
        data_path=DataPath.NONE,
        cache=CacheSize(num_blocks=7, source="why"),
        captured=CaptureReport(num_graphs=2, time_s=0.5, num_bytes=3, sizes={1: (1, 2)}, obstacle=""),
    )
    assert decode_from_worker(encode(ready)) == ready
    with LLM(device="cpu", cuda_graph_sizes=[1, 2]) as llm:
        assert llm.config.captured == CaptureReport(sizes={1: (1, 2)}, obstacle=CPU)


# ---- an engine on a CPU


def test_steps_on_a_cpu_are_padded_if_sizes_are_given_and_texts_stay_the_same() -> None:
    prompts, params = ["Once upon a time", "One day", "A cat"], SamplingParams(max_tokens=6, temperature=0)
    found = []
    for options in ({}, {"cuda_graph_sizes": "2,4"}, {"cuda_graph_sizes": "2,4", "enforce_eager": True}):
        with LLM(device="cpu", **options) as llm:
            texts = [output.text for output in llm.generate(prompts, params)]
            found.append((texts, llm.stats()))
    plain, padded, eager = found
    assert plain[0] == padded[0] == eager[0]
    steps = plain[1].steps
    assert steps == padded[1].steps == eager[1].steps > 1
    assert plain[1].graphs == {"replayed": 0, "padded": 0, "eager_reasons": {PROMPTS: 1, CPU: steps - 1}}
    assert padded[1].graphs == {"replayed": 0, "padded": steps - 1, "eager_reasons": {PROMPTS: 1, CPU: steps - 1}}
    assert eager[1].graphs["eager_reasons"] == {PROMPTS: 1, "enforce_eager is set": steps - 1}
    assert plain[1].synchronous_reasons == {}  # a CPU has nothing to run ahead of
