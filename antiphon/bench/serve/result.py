"""Prints the result of a serving benchmark, and writes it to a file named after load, model and date."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from antiphon.bench.conditions import check_writable
from antiphon.bench.serve.load import METRICS, ServeOptions
from antiphon.core.lines import JSON_ESCAPES

_BUSY_CLIENT = 0.8
"""Share of a core from which the client may be what is measured."""

DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "reasoning_texts", "errors")


def result_path(result: dict[str, Any], folder: Path | None, name: str | None) -> Path:
    """The path of the result in `folder` (default: the current one). name: replaces the generated file name."""
    if name is None:
        concurrency = f"-concurrency{result['max_concurrency']}" if result["max_concurrency"] is not None else ""
        model = re.sub(r"[^\w.-]", "_", result["model_id"].rsplit("/", 1)[-1])
        name = f"{result['endpoint_type']}-{result['request_rate']}qps{concurrency}-{model}-{result['date']}.json"
    return (folder or Path()) / name


def check_result_path(folder: Path | None, name: str | None) -> None:
    """Raise `OptionError` if the result cannot be written there. Call it before the measurement."""
    path = (folder or Path()) / (name or ".antiphon-result.json")  # the generated name is not known yet
    check_writable(path, "result-dir" if name is None else "result-filename")


def without_details(result: dict[str, Any]) -> dict[str, Any]:
    """The result without the lists that have one item per request."""
    return {key: value for key, value in result.items() if key not in DETAILS}


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write the result. Raises `OSError` if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, allow_nan=False, ensure_ascii=False).translate(JSON_ESCAPES) + "\n"
    # A limit on tokens can cut a character in half, which leaves a surrogate.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def print_serve(result: dict[str, Any], options: ServeOptions, console: Console) -> None:
    """Print tables of load and latencies, and the most frequent failures."""
    console.print(Text(f"{result['model_id']} at {options.base_url}{options.endpoint}"), soft_wrap=True)
    table = Table("load")
    table.add_column("", justify="right")
    for text, value in (
        ("requests answered", f"{result['completed']} of {result['num_prompts']}"),
        ("time (s)", f"{result['duration']:.2f}"),
        ("request rate (requests/s)", str(result["request_rate"])),
        ("request throughput (requests/s)", f"{result['request_throughput']:.2f}"),
        ("input tokens, output tokens", f"{result['total_input_tokens']}, {result['total_output_tokens']}"),
        ("output throughput (tokens/s)", f"{result['output_throughput']:.1f}"),
        ("total throughput (tokens/s)", f"{result['total_token_throughput']:.1f}"),
        ("peak concurrent requests", str(result["max_concurrent_requests"])),
        ("CPU time of this client (share of a core)", f"{result['client_cpu_share']:.2f}"),
    ):
        table.add_row(text, value)
    console.print(table)
    columns = ["mean", "median", "std", *[f"p{percentile:g}" for percentile in options.percentiles]]
    times = Table("ms")
    for column in columns:
        times.add_column(column, justify="right")
    for name in options.percentile_metrics:
        has_samples = result[f"mean_{name}_ms"] > 0  # one token has no gaps
        times.add_row(
            METRICS[name], *[f"{result[f'{column}_{name}_ms']:.2f}" if has_samples else "-" for column in columns]
        )
    console.print(times)
    if result["client_cpu_share"] > _BUSY_CLIENT:
        console.print("this client was busy almost all of the time, so it may be the limit", highlight=False)
    for text, count in list(result["failures"].items())[:5]:
        console.print(Text(f"{count} failed: {text}"))
