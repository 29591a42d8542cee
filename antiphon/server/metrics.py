"""The server's metrics as Prometheus text: its own counts of requests, and a mirror of the ranks' counts.

The names are those of vLLM's dashboards with the prefix `antiphon:`; docs/operate.md lists them. This module knows
neither HTTP nor the engine: the server calls it, and passes it `AsyncEngine.statistics` on each scrape.

    metrics = ServerMetrics("tiny-deepseek")
    metrics.request_started()
    metrics.first_token(0.120)
    metrics.next_tokens(1, 0.015)
    metrics.request_finished(reason="stop", num_prompt=7, num_generated=2, num_cached=0, seconds=0.135)
    text = metrics.render(await engine.statistics())
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

FINISH_REASONS = ("stop", "length", "abort", "error")

_PREFIX = "antiphon:"
_MODEL = "model_name"
# Seconds. The lowest buckets are for small models, the highest for long queues.
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_NEXT_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKEN_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class ServerMetrics:
    """The metrics of one server, in a registry of its own. Only the event loop's thread may use it.

    Report every generated token once, by `first_token` (one token) or `next_tokens`. Every request that was started
    must be finished once, however it ended.
    """

    content_type: ClassVar[str] = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str) -> None:
        """model_name: the label that all metrics of this server carry."""
        self._registry = registry = CollectorRegistry()
        self._model_name = model_name

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, text, (_MODEL, *labels), registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(_PREFIX + name, text, (_MODEL,), buckets=buckets, registry=registry)
            return family.labels(model_name)

        self._num_open = Gauge(
            _PREFIX + "num_requests_open", "Requests accepted and not answered yet", (_MODEL,), registry=registry
        ).labels(model_name)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests").labels(model_name)
        self._cached_tokens = counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache").labels(
            model_name
        )
        self._generated_tokens = counter("generation_tokens", "Generated tokens").labels(model_name)
        finished = counter("request_success", "Finished requests by reason", "finished_reason")
        self._finished = {reason: finished.labels(model_name, reason) for reason in FINISH_REASONS}
        self._rejected = counter("requests_rejected", "Requests answered with an error before they ran", "status")
        self._first_token_s = histogram(
            "time_to_first_token_seconds", "Time to first token, from the request's arrival", _FIRST_TOKEN_BUCKETS
        )
        self._next_token_s = histogram(
            "inter_token_latency_seconds", "Time between two tokens of a result", _NEXT_TOKEN_BUCKETS
        )
        self._request_s = histogram(
            "e2e_request_latency_seconds", "Time from a request's arrival to its last token", _REQUEST_BUCKETS
        )
        self._prompt_size = histogram("request_prompt_tokens", "Prompt tokens per request", _TOKEN_BUCKETS)
        self._result_size = histogram("request_generation_tokens", "Generated tokens per request", _TOKEN_BUCKETS)
        self._engine = _EngineCollector(model_name)
        registry.register(self._engine)
        ProcessCollector(registry=registry)

    def request_started(self) -> None:
        """A request was accepted."""
        self._num_open.inc()

    def first_token(self, seconds: float) -> None:
        """A request's first token arrived `seconds` after the request."""
        self._generated_tokens.inc()
        self._first_token_s.observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        """`count` more tokens of a result arrived together, `seconds` after the previous ones."""
        self._generated_tokens.inc(count)
        for _ in range(count):
            self._next_token_s.observe(seconds / count)

    def request_finished(
        self, *, reason: str, num_prompt: int, num_generated: int, num_cached: int, seconds: float
    ) -> None:
        """A request that was started has ended. reason: one of `FINISH_REASONS`. seconds: since its arrival.

        num_prompt: tokens of the prompt; num_cached: those found in the prefix cache. num_generated: tokens of all its
        results.
        """
        self._num_open.dec()
        self._finished[reason].inc()
        self._prompt_tokens.inc(num_prompt)
        self._cached_tokens.inc(num_cached)
        self._prompt_size.observe(num_prompt)
        self._result_size.observe(num_generated)
        self._request_s.observe(seconds)

    def rejected(self, status: int) -> None:
        """A request was answered with this HTTP status and never started."""
        self._rejected.labels(self._model_name, str(status)).inc()

    def render(self, stats_by_rank: list[dict[str, Any]] | None) -> bytes:
        """All metrics as text of type `content_type`.

        stats_by_rank: `AsyncEngine.statistics`, or `None` if the engine does not answer: then the gauges of the ranks
        are left out, and their counts keep the last values.
        """
        self._engine.take(stats_by_rank)
        return generate_latest(self._registry)


class _Mirror:
    """Mirrors counts of another process so that they never fall: a restarted count continues from its last value."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], float] = {}
        self._before: dict[tuple[str, ...], float] = {}

    def set(self, labels: tuple[str, ...], value: float) -> None:
        last = self._last.get(labels, 0.0)
        if value < last:
            self._before[labels] = self._before.get(labels, 0.0) + last
        self._last[labels] = value

    def items(self) -> Iterator[tuple[tuple[str, ...], float]]:
        for labels, value in self._last.items():
            yield labels, value + self._before.get(labels, 0.0)


# What the ranks count: name, text, and labels besides the model's.
_COUNTERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("num_preemptions", "Requests that gave up their KV blocks and are computed again", ("rank",)),
    ("prefix_cache_queries", "Tokens of admitted requests looked up in the prefix cache", ("rank",)),
    ("prefix_cache_hits", "Tokens found in the prefix cache", ("rank",)),
    ("steps", "Steps by plan, the same on all ranks", ("plan",)),
    ("serial_steps", "Steps that were not split, by reason, the same on all ranks", ("reason",)),
    ("steps_replayed", "Steps launched as one captured graph, the same on all ranks", ()),
    ("steps_eager", "Steps launched kernel by kernel, by reason, the same on all ranks", ("reason",)),
    ("step_device_seconds", "Time of steps on a device that queues its work", ("rank", "plan")),
    ("steps_synchronous", "Steps after which the host waited for the tokens, by reason", ("rank", "reason")),
    (
        "communication_seconds",
        "Time of communication, hidden behind compute or exposed",
        ("rank", "plan", "what"),
    ),
    ("communication_bytes", "Bytes communicated", ("rank", "plan")),
    ("expert_tokens", "Pairs of token and expert sent to a rank, counted in every 64th step", ("rank",)),
)
_GAUGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("num_requests_running", "Requests in the batch of a rank", ("rank",)),
    ("num_requests_waiting", "Requests waiting on a rank", ("rank",)),
    ("kv_cache_usage_perc", "Share of the KV blocks in use, 1 is all", ("rank",)),
    (
        "expert_tokens_max_over_mean",
        "Load of the busiest expert rank over the mean, averaged over layers, 1 is even",
        (),
    ),
)


class _EngineCollector(Collector):
    """The ranks' statistics as metrics: a mirror of each count, and the gauges of the last scrape."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._counters = {name: _Mirror() for name, _, _ in _COUNTERS}
        self._step_s, self._step_count = _Mirror(), _Mirror()
        self._gauges: dict[str, dict[tuple[str, ...], float]] = {}

    def take(self, stats_by_rank: Sequence[Mapping[str, Any]] | None) -> None:
        self._gauges = {name: {} for name, _, _ in _GAUGES}
        for rank, stats in enumerate(stats_by_rank or []):
            self._take_rank(str(rank), stats)
        if stats_by_rank:
            self._take_steps(stats_by_rank[0])
            self._take_expert_tokens([stats["expert_tokens"] for stats in stats_by_rank])

    def _take_rank(self, rank: str, stats: Mapping[str, Any]) -> None:
        blocks, cache, label = stats["kv_blocks"], stats["prefix_cache"], (rank,)
        self._gauges["num_requests_running"][label] = stats["running"]
        self._gauges["num_requests_waiting"][label] = stats["unfinished"] - stats["running"]
        self._gauges["kv_cache_usage_perc"][label] = 1 - blocks["free"] / blocks["total"] if blocks["total"] else 0.0
        self._counters["num_preemptions"].set(label, stats["preemptions"])
        self._counters["prefix_cache_queries"].set(label, cache["admitted_tokens"])
        self._counters["prefix_cache_hits"].set(label, cache["hit_tokens"])
        for reason, count in stats["synchronous_reasons"].items():
            self._counters["steps_synchronous"].set((rank, reason), count)
        for plan, seconds in stats["device_seconds"].items():
            self._counters["step_device_seconds"].set((rank, plan), seconds)
        for plan, sums in stats["overlap"].items():
            for what in ("hidden", "exposed"):
                if sums[f"{what}_s"] is not None:  # not observed on GPUs: report nothing rather than 0
                    self._counters["communication_seconds"].set((rank, plan, what), sums[f"{what}_s"])
            self._counters["communication_bytes"].set((rank, plan), sums["num_bytes"])
            self._step_s.set((rank, plan), sums["time_s"])
            self._step_count.set((rank, plan), stats["steps_by_plan"].get(plan, 0))

    def _take_steps(self, stats: Mapping[str, Any]) -> None:
        for plan, count in stats["steps_by_plan"].items():
            self._counters["steps"].set((plan,), count)
        for reason, count in stats["serial_reasons"].items():
            self._counters["serial_steps"].set((reason,), count)
        self._counters["steps_replayed"].set((), stats["graphs"]["replayed"])
        for reason, count in stats["graphs"]["eager_reasons"].items():
            self._counters["steps_eager"].set((reason,), count)

    def _take_expert_tokens(self, tokens_by_source: Sequence[Sequence[Sequence[int]]]) -> None:
        """tokens_by_source: [source rank][layer][expert's rank]. In every layer, a step waits for the busiest rank."""
        by_layer = [
            [sum(sources) for sources in zip(*layer, strict=True)] for layer in zip(*tokens_by_source, strict=True)
        ]
        for rank, counts in enumerate(zip(*by_layer, strict=True)):
            self._counters["expert_tokens"].set((str(rank),), sum(counts))
        ratios = [max(counts) * len(counts) / sum(counts) for counts in by_layer if any(counts)]
        if ratios:
            self._gauges["expert_tokens_max_over_mean"][()] = sum(ratios) / len(ratios)

    def collect(self) -> Iterator[Metric]:
        for family_type, table, samples in (
            (CounterMetricFamily, _COUNTERS, {name: mirror.items() for name, mirror in self._counters.items()}),
            (GaugeMetricFamily, _GAUGES, {name: gauge.items() for name, gauge in self._gauges.items()}),
        ):
            for name, text, labels in table:
                family = family_type(_PREFIX + name, text, labels=(_MODEL, *labels))
                for values, value in samples[name]:
                    family.add_metric((self._model_name, *values), value)
                yield family
        steps = SummaryMetricFamily(
            _PREFIX + "step_seconds", "Duration of steps by plan", labels=(_MODEL, "rank", "plan")
        )
        counts = dict(self._step_count.items())
        for values, seconds in self._step_s.items():
            steps.add_metric((self._model_name, *values), counts[values], seconds)  # type: ignore[arg-type]
        yield steps
