"""The server's metrics are right, monotonic and all in the docs; its logs hold no prompt and no key."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from antiphon.bench.serve.load import ServeOptions, run_serve
from antiphon.bench.serve.workload import Workload, make_asks
from antiphon.core.errors import EngineError, OptionError
from antiphon.server.logs import LOG_FIELDS, LineFormatter, log_config, log_event, logger
from antiphon.server.metrics import FINISH_REASONS, ServerMetrics
from tests.support.errors import raises
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


def stats_of_rank(factor: int = 1) -> dict[str, Any]:
    """The statistics as `StepEngine.statistics` returns them."""
    sums = {"time_s": 4.0, "communication_s": 3.0, "exposed_s": 1.0, "hidden_s": 2.0, "num_bytes": 100}
    return {
        "steps": 10 * factor,
        "steps_by_plan": {"serial": 3 * factor, "dual": 7 * factor},
        "serial_reasons": {"below the decode threshold": 3 * factor},
        "last_plan": "dual",
        "graphs": {"replayed": 4 * factor, "padded": 5 * factor, "eager_reasons": {"it has prompt tokens": 6 * factor}},
        "synchronous_reasons": {"logprobs": 2 * factor},
        "device_seconds": {"dual": 1.5 * factor},
        "overlap": {"dual": {name: value * factor for name, value in sums.items()}},
        "preemptions": 2 * factor,
        "prefix_cache": {"admitted_tokens": 50 * factor, "hit_tokens": 20 * factor},
        "kv_blocks": {"total": 40, "free": 30, "block_size": 16},
        "unfinished": 5,
        "running": 3,
        "expert_tokens": [[60 * factor, 20 * factor], [0, 40 * factor], [0, 0]],  # 3 layers, 2 ranks
    }


def values(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name without prefix, values of the labels in order of their names, without the model's) -> value."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("antiphon:"):
                assert labels.pop("model_name") == "m"
                found[(sample.name.removeprefix("antiphon:"), tuple(labels[key] for key in sorted(labels)))] = (
                    sample.value
                )
    return found


def test_what_requests_did_is_counted() -> None:
    metrics = ServerMetrics("m")
    for _ in range(3):
        metrics.request_started()
    metrics.first_token(0.3)
    metrics.next_tokens(4, 0.2)
    metrics.request_finished(reason="length", num_prompt=7, num_generated=5, num_cached=2, seconds=0.5)
    metrics.request_finished(reason="abort", num_prompt=3, num_generated=0, num_cached=0, seconds=0.1)
    metrics.rejected(429)
    metrics.rejected(429)
    found = values(metrics.render(None))
    assert found["num_requests_open", ()] == 1
    assert found["prompt_tokens_total", ()] == 10
    assert found["prompt_tokens_cached_total", ()] == 2
    assert found["generation_tokens_total", ()] == 5 == found["request_generation_tokens_sum", ()]
    assert {reason: found["request_success_total", (reason,)] for reason in FINISH_REASONS} == {
        "stop": 0,
        "length": 1,
        "abort": 1,
        "error": 0,
    }
    assert found["requests_rejected_total", ("429",)] == 2
    assert found["time_to_first_token_seconds_sum", ()] == 0.3
    assert found["inter_token_latency_seconds_count", ()] == 4
    assert found["inter_token_latency_seconds_bucket", ("0.05",)] == 4
    assert found["inter_token_latency_seconds_bucket", ("0.025",)] == 0
    assert found["e2e_request_latency_seconds_sum", ()] == pytest.approx(0.6)


def test_what_the_ranks_count_is_mirrored() -> None:
    second = stats_of_rank() | {"running": 5, "expert_tokens": [[0, 0], [60, 20], [0, 0]], "preemptions": 9}
    found = values(ServerMetrics("m").render([stats_of_rank(), second]))
    assert [found["num_requests_running", (rank,)] for rank in "01"] == [3, 5]
    assert [found["num_requests_waiting", (rank,)] for rank in "01"] == [2, 0]
    assert found["kv_cache_usage_perc", ("0",)] == 0.25
    assert [found["num_preemptions_total", (rank,)] for rank in "01"] == [2, 9]
    assert found["prefix_cache_queries_total", ("1",)] == 50
    assert found["prefix_cache_hits_total", ("1",)] == 20
    assert found["steps_total", ("dual",)] == 7  # from one rank: all run the same steps
    assert found["serial_steps_total", ("below the decode threshold",)] == 3
    assert found["steps_replayed_total", ()] == 4
    assert found["steps_eager_total", ("it has prompt tokens",)] == 6
    assert [found["steps_synchronous_total", (rank, "logprobs")] for rank in "01"] == [2, 2]
    assert found["communication_seconds_total", ("dual", "1", "hidden")] == 2
    assert found["communication_seconds_total", ("dual", "1", "exposed")] == 1
    assert found["communication_bytes_total", ("dual", "0")] == 100
    assert found["step_seconds_sum", ("dual", "0")] == 4
    assert [found["expert_tokens_total", (rank,)] for rank in "01"] == [120, 80]
    assert found["expert_tokens_max_over_mean", ()] == (60 / 40 + 60 / 60) / 2  # of the layers that were counted
    assert found["step_seconds_count", ("dual", "0")] == 7


def test_communication_that_nobody_observed_is_not_mirrored_as_zero() -> None:
    stats = stats_of_rank()
    stats["overlap"]["dual"] |= {"communication_s": None, "exposed_s": None, "hidden_s": None}
    found = values(ServerMetrics("m").render([stats]))
    assert not [name for name, _ in found if name == "communication_seconds_total"]
    assert found["communication_bytes_total", ("dual", "0")] == 100
    assert found["step_seconds_sum", ("dual", "0")] == 4


def test_counts_never_fall_and_gauges_are_of_now() -> None:
    metrics = ServerMetrics("m")
    before = values(metrics.render([stats_of_rank(factor=3)]))
    assert before["steps_total", ("dual",)] == 21
    silent = values(metrics.render(None))  # the engine has died
    assert ("num_requests_running", ("0",)) not in silent
    again = values(metrics.render([stats_of_rank(factor=1)]))  # a restarted engine
    assert again["steps_total", ("dual",)] == 28
    assert values(metrics.render([stats_of_rank(factor=2)]))["steps_total", ("dual",)] == 35
    for name, labels in before:
        if name.endswith(("_total", "_count", "_sum", "_bucket")):
            assert before[name, labels] <= silent[name, labels] <= again[name, labels], name


def test_two_servers_in_one_process_do_not_share_counts() -> None:
    first, second = ServerMetrics("m"), ServerMetrics("m")
    first.request_started()
    assert values(second.render(None))["num_requests_open", ()] == 0


def test_the_table_of_metrics_is_complete() -> None:
    metrics = ServerMetrics("m")
    metrics.rejected(400)
    families = list(text_string_to_metric_families(metrics.render([stats_of_rank()]).decode()))
    printed = {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for family in families
        if family.name.startswith("antiphon:") and not family.name.endswith("_created")
    }
    text = (ROOT / "docs/operate.md").read_text()
    rows = re.findall(r"^\| `(antiphon:\w+)` \| (\w+) \|(.*?)\|", text, flags=re.MULTILINE)
    assert {(name, kind) for name, kind, _ in rows} == printed
    labels = {name: set(re.findall(r"\w+", told)) for name, _, told in rows}
    for family in families:
        for sample in family.samples:
            name = family.name + ("_total" if family.type == "counter" else "")
            if name in labels:
                assert set(sample.labels) - {"le", "model_name"} == labels[name], name


@pytest.mark.processes
def test_the_server_counts_what_a_serving_benchmark_asks_of_it(server: ServerProcess) -> None:
    def counts() -> dict[tuple[str, tuple[str, ...]], float]:
        text = re.sub(rb'model_name="[^"]*"', b'model_name="m"', server.get("/metrics").content)
        return values(text)

    def lines() -> list[str]:
        return [line for line in server.log.splitlines() if "path=/v1/completions" in line and "num_generated" in line]

    before, num_lines = counts(), len(lines())
    workload = Workload(num_prompts=12, input_len=30, output_len=9, range_ratio=0.5)
    options = ServeOptions(base_url=server.url, workload=workload, max_concurrency=6, ignore_eos=True)
    result = run_serve(options)
    after = counts()

    def grown(name: str, *labels: str) -> float:
        return after[name, labels] - before.get((name, labels), 0.0)

    assert result["completed"] == 12 and result["max_concurrent_requests"] == 6
    assert grown("request_success_total", "length") == 12
    assert grown("prompt_tokens_total") == result["total_input_tokens"] == grown("request_prompt_tokens_sum")
    asked = sum(ask.max_tokens for ask in make_asks(workload))
    assert grown("generation_tokens_total") == result["total_output_tokens"] == asked
    assert grown("request_generation_tokens_sum") == asked
    assert grown("time_to_first_token_seconds_count") == grown("e2e_request_latency_seconds_count") == 12
    assert grown("inter_token_latency_seconds_count") == asked - 12
    # The server measures what the client measures, less the round trip.
    assert 0 < grown("time_to_first_token_seconds_sum") / 12 * 1e3 < result["mean_ttft_ms"]
    assert grown("steps_total", "dual") > 0 and grown("communication_bytes_total", "dual", "0") > 0
    assert sum(grown("prefix_cache_queries_total", rank) for rank in "01") == result["total_input_tokens"]
    assert all(after["expert_tokens_total", (rank,)] > 0 for rank in "01")
    assert 1 <= after["expert_tokens_max_over_mean", ()] < 2
    assert after["num_requests_open", ()] == 0 == after["kv_cache_usage_perc", ("0",)]
    wait_until(lambda: len(lines()) == num_lines + 12, "a line of the log for each request")
    assert "request_id=" in lines()[-1] and "first_token_s=" in lines()[-1]


SECRET = "the prompt of a client"


def lines_of(log_format: str, level: str, work: Callable[[], None]) -> list[str]:
    """What the configured handlers of the process would print."""
    stream = io.StringIO()
    config = log_config(log_format, level)
    (formatter,) = config["formatters"].values()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(formatter["log_format"], formatter["texts_of_errors"]))
    before = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(config["loggers"]["antiphon"]["level"])
    try:
        work()
    finally:
        logger.level, logger.handlers, logger.propagate = before
    return stream.getvalue().splitlines()


def one_event() -> None:
    log_event("request finished", request_id="a\nlevel=error", status=200, seconds=1 / 3, num_prompt=7, reason=None)


def test_an_event_is_one_line_of_json_or_of_keys_and_values() -> None:
    (line,) = lines_of("json", "info", one_event)
    told = json.loads(line)
    assert told["message"] == "request finished"
    assert (told["request_id"], told["status"], told["seconds"]) == ("a\nlevel=error", 200, 0.333333)
    assert "reason" not in told
    (line,) = lines_of("text", "info", one_event)
    assert line.endswith(
        r' INFO    request finished request_id="a\nlevel=error" status=200 seconds=0.333333 num_prompt=7'
    )
    assert lines_of("text", "warning", one_event) == []


ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("end", ENDS)
def test_no_value_ends_the_line(log_format: str, end: str) -> None:
    """`lines_of` splits lines as Python does: wherever any reader might."""

    def work() -> None:
        log_event(f"a{end}b", request_id=f"c{end}d", path=f"/{end}", error=EngineError(f"e{end}f"))
        logger.warning("of uvicorn, say: %s", f"{end}g{end}h{end}")

    first, second = lines_of(log_format, "info", work)
    if log_format == "json":
        told = json.loads(first)
        assert (told["message"], told["request_id"], told["path"]) == (f"a{end}b", f"c{end}d", f"/{end}")
        assert json.loads(second)["message"] == f"of uvicorn, say: {end}g{end}h{end}"
    else:
        assert " a b request_id=" in first and second.endswith("g h")
        assert json.loads(first.partition("request_id=")[2].partition(" path=")[0]) == f"c{end}d"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_error_is_logged_without_what_it_quotes(log_format: str) -> None:
    def fail() -> None:
        for error in (ValueError(SECRET), EngineError("rank 1 ended")):
            try:
                raise error
            except Exception as caught:
                log_event("request failed", level=logging.ERROR, error=caught, request_id="a")

    first, second = lines_of(log_format, "info", fail)
    assert SECRET not in first and "ValueError" in first and "test_metrics.py" in first
    assert "rank 1 ended" in second
    assert SECRET in lines_of(log_format, "debug", fail)[0]


def test_only_listed_fields_are_logged() -> None:
    with pytest.raises(AssertionError, match="prompt"):
        log_event("request finished", prompt=SECRET)
    assert not {"prompt", "text", "key", "authorization", "body", "query"} & set(LOG_FIELDS)


def test_the_configuration_of_logs_is_taken_by_uvicorn() -> None:
    code = (
        "import logging, uvicorn; from antiphon.server.logs import log_config, log_event\n"
        "uvicorn.Config(lambda: None, log_config=log_config('json', 'debug'))\n"
        "log_event('started', port=8000)\n"
        "logging.getLogger('uvicorn.error').info('up %d', 1)\n"
        "logging.getLogger('uvicorn.access').info('GET /?key=hidden')\n"
        "logging.getLogger('uvicorn.error').debug('hidden')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in told] == ["started", "up 1"]
    assert told[0]["port"] == 8000
    with raises(OptionError, option="log_format", value="jsn", remedy="'json'"):
        log_config("jsn")
    with raises(OptionError, option="log_level", value="wrning", remedy="'warning'"):
        log_config(log_level="wrning")
