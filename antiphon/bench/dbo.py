"""`antiphon bench dbo`: the same load with overlap off and on, interleaved, in one engine.

    round 1   off  on      every run has prompts of the same lengths but with other ids, so that no run finds the
    round 2   on   off     prompts of another in the prefix cache; the first round is a warm-up and does not count
    ...

The engine is the server's, without HTTP: the benchmark measures overlap, not the HTTP frontend.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from antiphon.bench.conditions import conditions
from antiphon.bench.measures import Summary
from antiphon.bench.serve.client import Answered
from antiphon.bench.serve.load import serve_figures, timed_load
from antiphon.bench.serve.workload import Ask, Workload, arrival_times, random_asks
from antiphon.config.describe import describe_config
from antiphon.config.engine_config import EngineConfig
from antiphon.core.errors import OptionError, unknown_value
from antiphon.core.policy import DBO_MODES
from antiphon.core.sampling import SamplingParams
from antiphon.frontend.async_engine import AsyncEngine
from antiphon.machine.advice import format_count
from antiphon.machine.versions import versions

_FIGURES = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "tokens/s",
    "mean_ttft_ms": "mean TTFT (ms)",
    "p90_ttft_ms": "p90 TTFT (ms)",
    "mean_tpot_ms": "mean TPOT (ms)",
    "mean_e2el_ms": "mean latency (ms)",
}

_RECORDED = ("num_prompts", "input_len", "output_len", "range_ratio", "vocab_size", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class DboOptions:
    """The load and the modes to compare. Raises `OptionError` for invalid ones.

    modes: values of `dbo`; the others are compared with the first one. repeats: runs of each mode after the warm-up.
    capacity_share: instead of a request rate, this share of the first mode's throughput when all are sent at once.
    """

    workload: Workload = field(default_factory=Workload)
    modes: tuple[str, ...] = ("off", "on")
    repeats: int = 5
    request_rate: float = inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    capacity_share: float | None = None

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in DBO_MODES:
                raise unknown_value("modes", mode, DBO_MODES)
        if len(set(self.modes)) < max(2, len(self.modes)):
            raise OptionError(
                f"--modes {','.join(self.modes)} compares nothing",
                remedy="use two or more different modes",
                option="modes",
            )
        if self.capacity_share is not None and (not self.capacity_share > 0 or isfinite(self.request_rate)):
            raise OptionError(
                f"--capacity-share {self.capacity_share:g} and --request-rate {self.request_rate:g} cannot be combined",
                remedy="pass a share above 0 and no rate",
                option="capacity-share",
            )
        rate = self.request_rate if self.capacity_share is None else 1.0  # the rate is only known after a measurement
        arrival_times(self.workload.num_prompts, rate, burstiness=self.burstiness, seed=self.workload.seed)


def run_dbo(config: EngineConfig, options: DboOptions, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Start the engine, do all runs and shut it down. The result can be written as JSON.

    Raises as `AsyncEngine` does, and `RequestError` if the load's requests do not fit the model.
    """
    engine = AsyncEngine(config)
    for heading, text in describe_config(engine.config):
        if heading != "dbo":
            say(f"{heading + ':':<11}{text}")
    return asyncio.run(_run(engine, options, say))


async def _run(engine: AsyncEngine, options: DboOptions, say: Callable[[str], None]) -> dict[str, Any]:
    engine.attach()
    try:
        # Use the whole vocabulary: the more ids there are, the more evenly tokens spread over the experts.
        options = replace(options, workload=replace(options.workload, vocab_size=engine.config.model.vocab_size))
        if options.capacity_share is not None:
            rate = options.capacity_share * await _capacity(engine, options)
            say(f"request rate: {rate:.2f}/s, {options.capacity_share:g} of the capacity with dbo {options.modes[0]}")
            options = replace(options, request_rate=rate, capacity_share=None)
        if "auto" in options.modes:
            say(f"dbo auto: {engine.config.resolve_policy(replace(engine.config.options.policy, dbo='auto')).reason}")
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in options.modes}
        for number in range(1 + options.repeats):
            order = options.modes if number % 2 == 0 else options.modes[::-1]
            for place, mode in enumerate(order):
                run = await _one_run(engine, options, mode, number=number * len(order) + place)
                told = ", ".join(f"{count} {plan}" for plan, count in run["steps_by_plan"].items() if count)
                warming = "" if number else " (warm-up)"
                say(f"dbo {mode}: {run['request_throughput']:.2f} requests/s, steps: {told}{warming}")
                if number:
                    runs[mode].append(run)
    finally:
        await engine.close()
    return _result(engine, options, runs)


async def _capacity(engine: AsyncEngine, options: DboOptions) -> float:
    """Requests/s of the first mode when all are sent at once, after one warm-up run."""
    at_once = replace(options, capacity_share=None)
    for number in (-2, -1):
        run = await _one_run(engine, at_once, options.modes[0], number=1_000_000 + number)
    return float(run["request_throughput"])


async def _one_run(engine: AsyncEngine, options: DboOptions, mode: str, *, number: int) -> dict[str, Any]:
    await engine.reconfigure(dbo=mode)
    workload = options.workload
    asks = random_asks(workload, workload.num_prompts, seed=(number,))
    times_s = arrival_times(len(asks), options.request_rate, burstiness=options.burstiness, seed=workload.seed)

    async def ask(one: Ask) -> Answered:
        return await _ask_engine(engine, one)

    before = await engine.statistics()
    answers, duration_s = await timed_load(asks, times_s, ask, max_concurrency=options.max_concurrency)
    after = await engine.statistics()
    figures = serve_figures(answers, duration_s, (90.0, 99.0))
    return {
        **{name: figures[name] for name in ("duration", *_FIGURES)},
        "steps_by_plan": _grown(before, after, "steps_by_plan"),
        "serial_reasons": _grown(before, after, "serial_reasons"),
        "cached_tokens": sum(
            new["prefix_cache"]["hit_tokens"] - old["prefix_cache"]["hit_tokens"]
            for old, new in zip(before, after, strict=True)
        ),
    }


async def _ask_engine(engine: AsyncEngine, ask: Ask) -> Answered:
    found = Answered(start_s=time.perf_counter(), num_input=len(ask.prompt))
    params = SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True, temperature=0.0)
    with engine.open(ask.prompt, params) as request:
        async for item in request:
            # When the tokens arrived; this task may have been woken later. Both clocks run at the same speed.
            now = time.perf_counter() - (time.monotonic() - item.at_s)
            if not item.delta.token_ids:
                continue
            found.saw_tokens(now)
            found.end_s = now
            found.num_output += len(item.delta.token_ids)
    return found


def _grown(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    """How much the counts of rank 0 have grown since `before`. All ranks have the same counts."""
    return dict(Counter(after[0][name]) - Counter(before[0][name]))


def compare_modes(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of each mode, and their ratios to the first mode, run by run."""
    first, *others = runs
    pairs = {mode: list(zip(runs[first], runs[mode], strict=True)) for mode in others}
    return {
        "compared_with": first,
        "figures": {
            mode: {name: Summary.of([run[name] for run in made]).to_dict() for name in _FIGURES}
            for mode, made in runs.items()
        },
        # Each pair of runs has its own ratio, because a slow phase of the machine affects both.
        "ratios": {
            mode: {
                name: Summary.of([run[name] / base[name] for base, run in made if base[name]] or [0.0]).to_dict()
                for name in _FIGURES
            }
            for mode, made in pairs.items()
        },
    }


def _result(engine: AsyncEngine, options: DboOptions, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    config = engine.config
    recorded = {name: value for name, value in asdict(options.workload).items() if name in _RECORDED} | {
        "request_rate": options.request_rate if isfinite(options.request_rate) else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "repeats": options.repeats,
        "peer_access": config.options.peer_access,
        "routing": config.options.routing,
    }
    where = {"device": config.device_name or config.device_kind, "versions": versions()}
    return {
        "bench": "dbo",
        "what": "one load on one engine, overlap off and on interleaved, as the server runs it, without HTTP",
        **conditions([where] * config.options.ranks, recorded),
        "model": config.options.model,
        "load_format": config.options.load_format,
        "num_layers": config.options.num_layers,
        "ranks": config.options.ranks,
        "transport": str(config.transport),
        "dtype": config.dtype_name,
        **compare_modes(runs),
        "steps_by_plan": {mode: _sum([run["steps_by_plan"] for run in made]) for mode, made in runs.items()},
        "serial_reasons": {mode: _sum([run["serial_reasons"] for run in made]) for mode, made in runs.items()},
        "runs": runs,
    }


def _sum(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter()))


def print_dbo(result: dict[str, Any], console: Console) -> None:
    """Print median, minimum and maximum over the runs, and the ratios to the first mode."""
    first, *others = result["figures"]
    repeats = result["options"]["repeats"]
    table = Table(
        "median (min..max)",
        title=Text(
            f"{result['model']}, {result['ranks']} ranks, {result['transport']}: "
            f"{format_count(repeats, 'run')} of each mode",
            style="table.title",
        ),
        title_justify="left",
    )
    for mode in (first, *others):
        table.add_column(f"dbo {mode}", justify="right")
    for mode in others:
        table.add_column(f"{mode} / {first}", justify="right")
    for name, text in _FIGURES.items():
        if not any(result["figures"][mode][name]["max"] for mode in (first, *others)):
            continue  # does not exist: with one token per request there is no time between tokens
        cells = [_cell(result["figures"][mode][name], 2) for mode in (first, *others)]
        cells += [_cell(result["ratios"][mode][name], 3) for mode in others]
        table.add_row(text, *cells)
    console.print(table)
    for mode, steps in result["steps_by_plan"].items():
        told = ", ".join(f"{count} {plan}" for plan, count in steps.items())
        reasons = ", ".join(f"{reason}: {count}" for reason, count in result["serial_reasons"][mode].items())
        console.print(Text(f"dbo {mode}: {told} steps" + (f" (serial because {reasons})" if reasons else "")))
        if mode != "off" and not steps.keys() - {"serial"}:
            console.print(f"no step of dbo {mode} was split, so this run says nothing about overlap", highlight=False)


def _cell(summary: dict[str, float], digits: int) -> str:
    return "{median:.{n}f} ({min:.{n}f}..{max:.{n}f})".format(**summary, n=digits)
