"""`antiphon bench overlap`: prefill steps of one model, serial and with overlap, and their parts alone.

It uses dummy weights and no engine, the same routing in every arm, and interleaves all arms of all transports in one
run. What each rank runs is in `rank`; docs/performance.md has the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from antiphon.bench.conditions import conditions
from antiphon.bench.measures import StepTimes, Summary, slowest_rank, step_figures
from antiphon.bench.ranks import run_on_ranks
from antiphon.comm.needs import peer_environment
from antiphon.core.errors import AntiphonError

_LIMITS = {"float64": (1e-9, 1e-8), "float32": (1e-3, 1e-2), "bfloat16": (0.1, 0.5)}
"""Largest relative error over all hidden states and of a single token, by dtype. Rounding grows with depth. A transport
that loses or swaps a row causes an error of about 1 in that token."""

_WIDE_FACTOR = 3.0
"""With routing="model", rounding sends some tokens to other experts, so single tokens can differ completely."""


class OutputsDiffer(AntiphonError, RuntimeError):  # noqa: N818 (states what happened)
    """Steps whose hidden states differ from the first serial step; `value` lists them: (tokens, transport, arm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapOptions:
    """The resolved options of `antiphon bench overlap`."""

    model: str
    ranks: int
    device: str
    tokens: list[int]  # of a step, on every rank
    transports: list[str]
    routing: str
    dtype: str
    num_layers: int | None
    seq_len: int
    micro_batches: int
    repeats: int
    seed: int
    peer_access: bool
    timeout_s: float


def run_overlap(options: OverlapOptions) -> dict[str, Any]:
    """Measure, and return the result as one JSON object. `check_outputs` checks whether to trust it."""
    results = run_on_ranks(
        "antiphon.bench.overlap.rank:measure_steps",
        ranks=options.ranks,
        device=options.device,
        options=asdict(options),
        timeout_s=options.timeout_s,
        environment=peer_environment(peer_access=options.peer_access),
    )
    return {
        "bench": "overlap",
        "what": (
            "prefill steps of a model with dummy weights, without an engine; medians of the slowest rank, "
            "all arms of all transports interleaved in one run, the same routing in all of them"
        ),
        **conditions(results, asdict(options)),
        "model": {"name": Path(options.model).name, **results[0]["model"]},
        "results": summarize_steps(
            [result["steps"] for result in results], options, num_layers=results[0]["model"]["layers"]
        ),
    }


def summarize_steps(
    steps_by_rank: Sequence[Sequence[dict[str, Any]]], options: OverlapOptions, *, num_layers: int
) -> list[dict[str, Any]]:
    """The figures of every transport for each number of tokens, and the transport with the fastest serial step."""
    return [_summarize(steps, options, num_layers) for steps in zip(*steps_by_rank, strict=True)]


def _summarize(steps: Sequence[dict[str, Any]], options: OverlapOptions, num_layers: int) -> dict[str, Any]:
    names = list(steps[0]["transports"])
    cells = {name: [step["transports"][name] for step in steps] for name in names}
    repeats = {
        name: {arm: slowest_rank([cell["ms"][arm] for cell in cells[name]]) for arm in cells[name][0]["ms"]}
        for name in names
    }
    summaries = {name: {arm: Summary.of(values) for arm, values in repeats[name].items()} for name in names}
    best = min(names, key=lambda name: summaries[name]["S"].median)
    transports = {}
    for name in names:
        times = StepTimes(**{arm: summary.median for arm, summary in summaries[name].items()})
        host = {arm: Summary.of(slowest_rank([cell["host_ms"][arm] for cell in cells[name]])) for arm in ("S", "D")}
        lanes = {"S": 1, "D": options.micro_batches}
        transports[name] = {
            "ms": {arm: summary.to_dict() for arm, summary in summaries[name].items()},
            **step_figures(times, best_serial=summaries[best]["S"].median),
            "host_us_a_layer_and_lane": {arm: host[arm].median * 1e3 / (num_layers * lanes[arm]) for arm in host},
            "errors": _largest_errors(cells[name]),
            "repeats_ms": repeats[name],
        }
    return {"tokens": steps[0]["tokens"], "best_serial": best, "transports": transports}


def _largest_errors(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The largest errors over ranks; `None` if one is not finite."""
    largest = {}
    for arm in cells[0]["errors"]:
        whole, worst = (max(cell["errors"][arm][place] for cell in cells) for place in (0, 1))
        largest[arm] = {"whole": _finite(whole), "worst_token": _finite(worst)}
    return largest


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check_outputs(result: dict[str, Any]) -> None:
    """Raise `OutputsDiffer` if the hidden states of any S or D differ from those of the first S."""
    options = result["options"]
    whole_limit, token_limit = _LIMITS[options["dtype"]]
    if options["routing"] == "model" and options["dtype"] != "float64":
        whole_limit, token_limit = _WIDE_FACTOR * whole_limit, math.inf
    problems, places = [], []
    for step in result["results"]:
        for name, cell in step["transports"].items():
            for arm, errors in cell["errors"].items():
                whole, worst = errors["whole"], errors["worst_token"]
                if whole is None or worst is None or whole > whole_limit or worst > token_limit:
                    places.append((step["tokens"], name, arm))
                    problems.append(f"{step['tokens']} tokens, {name}, {arm}: {whole} over all, {worst} in a token")
    if problems:
        raise OutputsDiffer(
            f"hidden states differ from those of the first serial step by more than {whole_limit:g} over all or "
            f"{token_limit:g} in a token, so these times are meaningless: {'; '.join(problems)}",
            value=places,
        )


FIGURES = (
    ("S/D", "serial_over_dual"),
    ("best S/D", "best_serial_over_dual"),
    ("recovered", "recovered"),
    ("efficiency", "overlap_efficiency"),
    ("attainment", "roofline_attainment"),
)
"""Column heading and key of each figure in a table."""


def print_steps(result: dict[str, Any], console: Console) -> None:
    """Print one table per number of tokens. Times are medians in ms."""
    model, options = result["model"], result["options"]
    what = (
        f"{model['name']}, {model['layers']} layers ({model['moe_layers']} with experts), {options['dtype']}, "
        f"{options['routing']} routing, {len(result['devices'])} x {result['devices'][0]}, "
        f"peer access {'on' if options['peer_access'] else 'off'}, {options['repeats']} repeats"
    )
    console.print(Text(what), soft_wrap=True)
    for step in result["results"]:
        table = Table(
            title=Text(f"{step['tokens']} tokens per rank; best serial: {step['best_serial']}", style="table.title"),
            title_justify="left",
        )
        table.add_column("transport", overflow="fold", min_width=len("simulated:allgather:"))
        for heading in ("S", "C", "M", "C2", "D", "D, min to max", *(name for name, _ in FIGURES), "host us"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, cell in step["transports"].items():
            ms = cell["ms"]
            host = cell["host_us_a_layer_and_lane"]
            table.add_row(
                Text(name),
                *(f"{ms[arm]['median']:.2f}" for arm in ("S", "C", "M", "C2", "D")),
                f"{ms['D']['min']:.2f} to {ms['D']['max']:.2f}",
                *("" if cell[key] is None else f"{cell[key]:.2f}" for _, key in FIGURES),
                f"{host['S']:.0f}, {host['D']:.0f}",
            )
        console.print(table)
