"""`antiphon bench decode`: the time of a decode step in the real engine, beside the least time that it could take.

What each rank runs is in `rank`, the least time in `floor`; docs/bench_decode.md says how to read the table.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from antiphon.bench.conditions import conditions
from antiphon.bench.decode.floor import ModelBytes, step_bytes
from antiphon.bench.decode.options import DecodeOptions
from antiphon.bench.measures import Summary, slowest_rank
from antiphon.bench.ranks import run_on_ranks
from antiphon.comm.needs import peer_environment

_PROFILER_ENVIRONMENT = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
"""Profiling captured steps more than once in a process crashes without these in some versions of CUDA."""

_NAME_WIDTH = 90


def run_decode(options: DecodeOptions) -> dict[str, Any]:
    """Measure, and return the result as one JSON object. Raises as `DecodeOptions.resolve` and `run_on_ranks` do."""
    options.resolve()
    results = run_on_ranks(
        "antiphon.bench.decode.rank:measure_decode",
        ranks=options.ranks,
        device=options.device,
        options=asdict(options),
        timeout_s=options.timeout_s,
        environment=peer_environment(peer_access=options.peer_access)
        | (_PROFILER_ENVIRONMENT if options.kernels else {}),
    )
    first = results[0]
    return {
        "bench": "decode",
        "what": (
            "decode steps of the engine with dummy weights, every sequence with one token a step; all plans "
            "interleaved in one run; ms a step of the slowest rank"
        ),
        **conditions(results, asdict(options)),
        "model": {"name": Path(options.model).name, **first["model"]},
        **{name: first[name] for name in ("transport", "data_path", "dtype", "graphs", "model_bytes")},
        "copy_gb_per_s": min(result["copy_bytes_per_s"] for result in results) / 1e9,
        "results": summarize_cells(results, options),
    }


def summarize_cells(results: Sequence[dict[str, Any]], options: DecodeOptions) -> list[dict[str, Any]]:
    """The figures of every cell. results: what `measure_decode` returned, in rank order."""
    bandwidth = min(result["copy_bytes_per_s"] for result in results)
    model = ModelBytes(**results[0]["model_bytes"])
    by_cell = zip(*(result["cells"] for result in results), strict=True)
    return [_summarize(cells, model, options, bandwidth) for cells in by_cell]


def _summarize(
    cells: Sequence[dict[str, Any]], model: ModelBytes, options: DecodeOptions, bandwidth: float
) -> dict[str, Any]:
    first = cells[0]
    where = {"context_len": first["context_len"], "sequences": first["sequences"], "plan": first["plan"]}
    if first["not_run"]:
        return {**where, "not_run": first["not_run"]}
    repeats = slowest_rank([cell["ms"] for cell in cells])
    ms = Summary.of(repeats)
    device_ms = None if first["device_ms"] is None else max(cell["device_ms"] for cell in cells)
    context = statistics.fmean(first["contexts"])
    floor: dict[str, Any] = {"floor_ms": None, "of_floor": None, "bytes": None}
    if options.routing == "uniform":  # how many experts another routing uses is not known
        moved = step_bytes(
            model,
            sequences=first["sequences"],
            context=context,
            num_ranks=options.ranks,
            num_lanes=2 if first["plan"] == "dual" else 1,
        )
        floor_ms = moved.total / bandwidth * 1e3
        floor = {"floor_ms": floor_ms, "of_floor": floor_ms / ms.median, "bytes": asdict(moved)}
    return {
        **where,
        "launch": first["launch"],
        "steps": options.num_steps(first["plan"]),
        "context": context,
        "ms": ms.to_dict(),
        "device_ms": device_ms,
        "idle_ms": None if device_ms is None else ms.median - device_ms,
        **floor,
        "kernels": first["kernels"],
        "repeats_ms": repeats,
    }


def print_decode(result: dict[str, Any], console: Console) -> None:
    """Print one table per context, and the kernels of the cells that were profiled. Times in ms a step."""
    model, options = result["model"], result["options"]
    console.print(
        Text(
            f"{model['name']}, {model['layers']} layers, {result['dtype']}, {options['routing']} routing, "
            f"{len(result['devices'])} x {result['devices'][0]}, {result['transport']} ({result['data_path']}), "
            f"copies at {result['copy_gb_per_s']:.0f} GB/s, medians of {options['repeats']}"
        ),
        soft_wrap=True,
    )
    obstacle = result["graphs"]["obstacle"]
    if obstacle:
        console.print(Text(f"no step is captured: {obstacle}"), soft_wrap=True)
    for context_len in options["contexts"]:
        cells = [cell for cell in result["results"] if cell["context_len"] == context_len]
        console.print(_table(f"context {context_len}: ms a step", cells))
        for cell in cells:
            if "not_run" in cell:
                console.print(
                    Text(f"{cell['sequences']} sequences, {cell['plan']}: not run: {cell['not_run']}"), soft_wrap=True
                )
    for cell in result["results"]:
        if cell.get("kernels"):
            _print_kernels(cell, console)
    if options["kernels"] and not any(cell.get("kernels") for cell in result["results"]):
        console.print("no kernel tables: they need captured steps", highlight=False)


def _table(title: str, cells: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    headings = ("sequences", "plan", "launch", "ms", "min to max", "device", "idle", "floor", "floor / ms", "context")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("plan", "launch") else "right", no_wrap=True)
    for cell in cells:
        if "not_run" in cell:
            table.add_row(str(cell["sequences"]), cell["plan"], "not run")
            continue
        ms = cell["ms"]
        table.add_row(
            str(cell["sequences"]),
            cell["plan"],
            cell["launch"],
            f"{ms['median']:.2f}",
            f"{ms['min']:.2f} to {ms['max']:.2f}",
            *("" if cell[name] is None else f"{cell[name]:.2f}" for name in ("device_ms", "idle_ms")),
            *("" if cell[name] is None else f"{cell[name]:.2f}" for name in ("floor_ms", "of_floor")),
            f"{cell['context']:.0f}",
        )
    return table


def _print_kernels(cell: dict[str, Any], console: Console) -> None:
    kernels = cell["kernels"]
    table = Table(
        title=Text(
            f"context {cell['context_len']}, {cell['sequences']} sequences, {cell['plan']}: {kernels['calls']:.0f} "
            f"kernels a step take {kernels['all_us']:.0f} us in all; nothing runs for {kernels['gap_us']:.0f} us",
            style="table.title",
        ),
        title_justify="left",
    )
    table.add_column("kernel", no_wrap=True)
    for heading in ("calls a step", "us a step", "share"):
        table.add_column(heading, justify="right")
    for line in kernels["lines"]:
        table.add_row(
            Text(line["name"][:_NAME_WIDTH]), f"{line['calls']:.1f}", f"{line['us']:.1f}", f"{line['share']:.1%}"
        )
    console.print(table)
