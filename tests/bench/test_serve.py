"""The serving benchmark: its load is as requested, and its figures match a server with known timing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from antiphon.bench.serve.client import Answered, Target, request_body
from antiphon.bench.serve.load import ServeOptions, run_serve, serve_figures
from antiphon.bench.serve.result import DETAILS, print_serve, result_path, write_result
from antiphon.bench.serve.workload import Ask, Workload, arrival_times, make_asks, random_asks
from antiphon.core.errors import OptionError
from tests.support.errors import raises
from tests.support.openai_server import FakeServer

SMALL = Workload(num_prompts=6, input_len=10, output_len=5)

# Of a file that vLLM's benchmark writes, with the default metrics and percentiles; tokenizer and goodput aside.
KEYS = {
    *("date", "endpoint_type", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency"),
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "output_throughput", "total_token_throughput"),
    *(f"{what}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for what in ("mean", "median", "std", "p99")),
}


def test_random_prompts_have_the_lengths_asked_for() -> None:
    equal = make_asks(SMALL)
    assert {(len(ask.prompt), ask.max_tokens) for ask in equal} == {(10, 5)}
    wide = make_asks(replace(SMALL, num_prompts=400, input_len=100, output_len=20, range_ratio=0.5))
    inputs = [len(ask.prompt) for ask in wide]
    assert min(inputs) in range(50, 56) and max(inputs) in range(145, 151) and 95 < np.mean(inputs) < 105
    assert {ask.max_tokens for ask in wide} == set(range(10, 31))
    assert all(256 <= number < 4000 for ask in wide for number in ask.prompt if isinstance(number, int))


def test_the_seed_decides_and_another_series_has_the_same_sizes() -> None:
    workload = replace(SMALL, range_ratio=0.5)
    assert make_asks(workload) == make_asks(workload) != make_asks(replace(workload, seed=1))
    one, two = random_asks(workload, 6, seed=(1,)), random_asks(workload, 6, seed=(2,))
    assert [(len(a.prompt), a.max_tokens) for a in one] == [(len(a.prompt), a.max_tokens) for a in two]
    assert all(a.prompt != b.prompt for a, b in zip(one, two, strict=True))


def test_arrivals_are_at_the_rate_and_as_bursty_as_asked() -> None:
    assert arrival_times(3, inf) == [0.0, 0.0, 0.0]
    spread = {}
    for burstiness in (0.25, 1.0, 100.0):
        times = arrival_times(2000, 50.0, burstiness=burstiness)
        assert times[0] == 0 and times[-1] == pytest.approx(1999 / 50)
        gaps = np.diff(times)
        spread[burstiness] = gaps.std() / gaps.mean()
    assert spread[1.0] == pytest.approx(1.0, abs=0.1)  # as of an exponential distribution
    assert spread[0.25] == pytest.approx(2.0, abs=0.3) and spread[100.0] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(("rate", "burstiness"), [(1.0, 1e-300), (1e-320, 1.0), (1.0, 1e308)])
def test_arrivals_that_have_no_times_are_refused(rate: float, burstiness: float) -> None:
    with raises(OptionError, "--request-rate", option="burstiness"):
        arrival_times(5, rate, burstiness=burstiness)


@pytest.mark.parametrize(
    ("wrong", "option", "remedy"),
    [
        ({"dataset": "shargpt"}, "dataset-name", "'sharegpt'"),
        ({"dataset": "custom"}, "dataset-name", "--dataset-path"),
        ({"range_ratio": 1.0}, "random-range-ratio", "0"),
        ({"vocab_size": 10}, "random-vocab-size", "256"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], option: str, remedy: str) -> None:
    with raises(OptionError, option=option, remedy=remedy):
        Workload(**wrong)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"base_url": "localhost:8000"}, "--base-url"),
        ({"endpoint": "v1/completions"}, "--endpoint"),
        ({"base_url": "http://127.0.0.1:99999"}, "--port"),
        ({"base_url": "http://[::1:8000"}, "--base-url"),
        ({"base_url": "http://host\n"}, "--base-url"),
        ({"api_key": "schlüssel"}, "OPENAI_API_KEY"),
        ({"api_key": "key\n"}, "OPENAI_API_KEY"),
        ({"percentiles": (101.0,)}, "metric-percentiles 101"),
        ({"percentile_metrics": ("tttf",)}, "'ttft'"),
        ({"request_rate": 0.0}, "--request-rate"),
        ({"burstiness": 0.0}, "--burstiness"),
    ],
)
def test_options_that_cannot_work_are_refused(wrong: dict[str, Any], name: str) -> None:
    with raises(OptionError, name) as refused:
        run_serve(ServeOptions(**wrong))
    assert "\n" not in str(refused.error) and wrong.get("api_key", "none") not in str(refused.error)


def test_figures_of_known_answers() -> None:
    answers = [
        Answered(start_s=0.0, end_s=1.0, first_s=0.2, gaps_s=[0.4, 0.4], num_input=10, num_output=3),
        Answered(start_s=0.5, end_s=3.5, first_s=1.0, gaps_s=[1.0, 1.0], num_input=20, num_output=5),
        Answered(start_s=0.6, end_s=0.7, error="HTTP 500"),
        Answered(start_s=2.0, end_s=4.0, first_s=2.0, num_input=1, num_output=1),
    ]
    figures = serve_figures(answers, 4.0, (50.0, 99.9))
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (31, 9)
    assert figures["request_throughput"] == 0.75 and figures["output_throughput"] == 2.25
    assert figures["total_token_throughput"] == 10
    assert figures["median_ttft_ms"] == figures["p50_ttft_ms"] == 1000
    assert figures["mean_tpot_ms"] == pytest.approx((400 + 500) / 2)  # one token has no time per further token
    assert figures["mean_itl_ms"] == pytest.approx(700) and figures["mean_e2el_ms"] == pytest.approx(2000)
    assert figures["std_e2el_ms"] == pytest.approx(np.std([1000, 3000, 2000]))
    assert 1990 < figures["p99.9_ttft_ms"] <= 2000
    assert figures["max_concurrent_requests"] == 3
    nothing = serve_figures(answers[2:3], 1.0, (99.0,))
    assert nothing["completed"] == nothing["p99_ttft_ms"] == 0


def test_what_is_asked_is_what_servers_know() -> None:
    target = Target(url="", model="m", ignore_eos=True)
    assert request_body(Ask(prompt=[1], max_tokens=2), target) == {
        "model": "m",
        "prompt": [1],
        "max_tokens": 2,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    chat = request_body(Ask(prompt="hi", max_tokens=2), replace(target, is_chat=True, ignore_eos=False))
    assert chat["messages"] == [{"role": "user", "content": "hi"}] and chat["max_completion_tokens"] == 2
    assert "ignore_eos" not in chat and "prompt" not in chat


@pytest.mark.processes  # they watch the clock
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [True, False])
def test_a_server_of_known_pace_is_measured(endpoint: str, usage: bool) -> None:
    for _ in range(3):  # if the system takes the processor away for a while
        with FakeServer(first_s=0.1, gap_s=0.05, usage=usage).running() as fake:
            result = run_serve(
                ServeOptions(base_url=fake.url, endpoint=endpoint, workload=SMALL, num_warmups=1, detailed=True)
            )
        _check_answers(result, fake, endpoint, usage)
        if _is_of_known_pace(result):
            return
    pytest.fail(f"the pace is not that of the server: {result}")


def _check_answers(result: dict[str, Any], fake: FakeServer, endpoint: str, usage: bool) -> None:
    assert result.keys() >= KEYS
    assert (result["completed"], result["failed"], result["model_id"]) == (6, 0, "fake/model")
    assert len(fake.bodies) == 7 and fake.most_at_once == result["max_concurrent_requests"] == 6
    # Words of a chat are not counted where the server does not tell.
    assert result["total_input_tokens"] == 6 * (77 if usage else 0 if "chat" in endpoint else 10)
    assert result["total_output_tokens"] == 30 and result["output_lens"] == [5] * 6
    assert result["generated_texts"] == ["a a a a a "] * 6
    assert result["median_ttft_ms"] >= 100 and result["median_e2el_ms"] >= 300 and result["duration"] >= 0.3
    assert result["endpoint_type"] == ("openai-chat" if "chat" in endpoint else "openai")


def _is_of_known_pace(result: dict[str, Any]) -> bool:
    return (
        result["median_ttft_ms"] < 300
        and 40 <= result["median_tpot_ms"] < 150
        and 40 <= result["median_itl_ms"] < 150
        and result["median_e2el_ms"] < 900
        and result["duration"] < 2
    )


@pytest.mark.parametrize(("max_concurrency", "at_once"), [(3, 3), (None, 1)])
def test_warm_up_requests_are_as_many_at_once_as_the_load(max_concurrency: int | None, at_once: int) -> None:
    with FakeServer(first_s=0.3).running() as fake:
        workload = replace(SMALL, num_prompts=1)
        options = ServeOptions(base_url=fake.url, workload=workload, num_warmups=4, max_concurrency=max_concurrency)
        result = run_serve(options)
    assert fake.most_at_once == at_once and len(fake.bodies) == 5
    assert result["completed"] == 1 and result["total_output_tokens"] == SMALL.output_len
    assert 0 < result["client_cpu_share"] < 1.5
    for share, warned in ((0.3, False), (0.95, True)):
        printed = io.StringIO()
        print_serve(result | {"client_cpu_share": share}, options, Console(file=printed, width=120))
        assert f"{share:.2f}" in printed.getvalue() and ("may be the limit" in printed.getvalue()) == warned


@pytest.mark.processes  # it watches the clock
def test_requests_do_not_wait_for_answers_unless_told_to() -> None:
    with FakeServer(first_s=2.0).running() as fake:
        workload = replace(SMALL, num_prompts=9, output_len=1)
        begin_s = time.perf_counter()
        result = run_serve(ServeOptions(base_url=fake.url, workload=workload, request_rate=20.0))
        assert fake.arrivals[-1] - begin_s >= 8 / 20
        assert fake.most_at_once == 9, "the last came before the first was answered"
        assert result["request_rate"] == 20 and 0 <= result["max_lateness_ms"] < 2000
    for _ in range(3):  # if the system takes the processor away for a while
        with FakeServer(first_s=0.2).running() as fake:
            result = run_serve(ServeOptions(base_url=fake.url, workload=workload, max_concurrency=3))
        assert fake.most_at_once == 3 and result["completed"] == 9
        assert result["duration"] > 3 * 0.2
        if result["median_ttft_ms"] < 380:  # 400 with the wait for a place
            return
    pytest.fail(f"the wait for a place is counted: {result}")


def test_what_fails_is_counted_and_told_and_is_in_no_figure() -> None:
    fails = {0: "event", 1: "cut", 2: "status", 4: "status"}
    with FakeServer(first_s=0.01, gap_s=0.01, fail=fails).running() as fake:
        result = run_serve(ServeOptions(base_url=fake.url, workload=SMALL, max_concurrency=1))
    assert (result["completed"], result["failed"]) == (2, 4)
    assert result["total_output_tokens"] == 10
    assert list(result["failures"].values()) == [2, 1, 1]
    told = " ".join(result["failures"])
    assert "HTTP 429" in told and "rank 1 ended" in told and "without [DONE]" in told


def test_a_server_that_wants_a_key_or_texts() -> None:
    with FakeServer(first_s=0, gap_s=0, api_key="k", takes_ids=False).running() as fake:
        with raises(OptionError, remedy="OPENAI_API_KEY"):
            run_serve(ServeOptions(base_url=fake.url, workload=SMALL))
        with_key = ServeOptions(base_url=fake.url, workload=SMALL, api_key="k")
        assert "api_key" not in repr(with_key)
        refused = run_serve(with_key)
        assert refused["completed"] == 0 and "must be a string" in next(iter(refused["failures"]))
        taken = run_serve(replace(with_key, workload=replace(SMALL, as_text=True)))
        assert taken["completed"] == 6 and len(fake.bodies[-1]["prompt"].split()) == 10


def bench_serve(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    return subprocess.run(
        [sys.executable, "-m", "antiphon.cli", "bench", "serve", *words],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )


@pytest.mark.processes
def test_the_command_prints_a_table_and_saves_the_result(tmp_path: Path) -> None:
    words = ["--num-prompts", "4", "--random-input-len", "8", "--random-output-len", "3", "--request-rate", "inf"]
    words += ["--max-concurrency", "2", "--metric-percentiles", "50,90", "--percentile-metrics", "ttft,e2el"]
    words += ["--save-result", "--save-detailed", "--result-dir", str(tmp_path / "new"), "--ignore-eos"]
    with FakeServer(first_s=0.01, gap_s=0.01).running() as fake:
        done = bench_serve("--base-url", fake.url, *words)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["completed"] == 4 and "p90_ttft_ms" in last and not set(DETAILS) & set(last)
    assert "time to first token" in done.stderr and "inter-token" not in done.stderr and "p90" in done.stderr
    path = result_path(last, tmp_path / "new", None)
    assert path.name == f"openai-infqps-concurrency2-model-{last['date']}.json"
    saved = json.loads(path.read_text())
    assert saved["output_lens"] == [3] * 4 and len(saved["itls"][0]) == 2
    assert fake.bodies[0]["ignore_eos"] is True


@pytest.mark.processes
def test_the_command_fails_if_nothing_was_answered() -> None:
    with FakeServer(fail={0: "status"}).running() as fake:
        done = bench_serve("--base-url", fake.url, "--num-prompts", "1")
    assert done.returncode == 1 and "too many" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == 1
    gone = bench_serve("--base-url", fake.url)
    assert gone.returncode == 2 and "cannot be reached" in gone.stderr and len(gone.stderr.splitlines()) == 1


def test_a_text_that_is_no_unicode_does_not_lose_the_result(tmp_path: Path) -> None:
    result = {"generated_texts": ["caf\u00e9 \ud83d", "\\ud83d"], "completed": 2}
    write_result(result, tmp_path / "new" / "result.json")
    assert json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8")) == result
