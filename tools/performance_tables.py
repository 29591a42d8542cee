"""Write the tables of docs/performance.md from the results, so that no figure is typed by hand.

    python -m tools.performance_tables            # rewrite docs/performance.md
    python -m tools.performance_tables --check    # exit code 1 if it does not match the results

Reads every file in benchmarks/results that `antiphon bench`, tools/prefill_throughput.py or tools/serve_by_turns.py
wrote; other files are ignored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antiphon.bench.comm.exchanges import size_text
from antiphon.bench.overlap.steps import FIGURES

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/performance.md"
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- tables: written by tools/performance_tables.py -->", "<!-- end of tables -->"


def main(arguments: Sequence[str]) -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    new = with_tables(text, read_results(RESULTS))
    if "--check" in arguments:
        return int(new != text)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of `antiphon bench` by file name."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and result.get("bench") in SECTIONS:
            results[path.name] = result
    return results


def with_tables(text: str, results: dict[str, dict[str, Any]]) -> str:
    """The document with new tables between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN!r} followed by {END!r}; add both")
    sections = [section(name, results[name]) for name in results]
    body = "\n\n".join(sections) if sections else "No result is recorded yet."
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def section(name: str, result: dict[str, Any]) -> str:
    """Heading, conditions and tables of one file."""
    options, versions = result["options"], result["versions"]
    what, table = SECTIONS[result["bench"]]
    conditions = [
        what(result),
        f"{len(result['devices'])} x {result['devices'][0]}",
        f"peer access {'on' if options.get('peer_access', not options.get('no_peer_access')) else 'off'}",
        f"medians of {options['repeats']}",
        *(f"{key} {versions[key]}" for key in ("torch", "cuda", "nccl", "triton", "driver") if key in versions),
        result["date"][:10],
    ]
    heading = f"### {name.removesuffix('.json')}"
    source = f"[{name}](../benchmarks/results/{name})"
    return "\n\n".join([heading, f"{'; '.join(filter(None, conditions))}. All repeats: {source}.", table(result)])


def overlap_words(result: dict[str, Any]) -> str:
    model, options = result["model"], result["options"]
    return (
        f"{model['name']}, {model['layers']} layers ({model['moe_layers']} with experts), {options['dtype']}, "
        f"routing {options['routing']}, sequences of {options['seq_len']} tokens"
    )


def prefill_words(result: dict[str, Any]) -> str:
    options = result["options"]
    return (
        f"{options['model']}, whole engine, {options['prompts']} prompts of {options['length']:,} tokens per GPU, "
        f"{options['batched_tokens']:,} tokens per step, routing {options['routing']}, {result['transport']}"
    )


def dbo_words(result: dict[str, Any]) -> str:
    options = result["options"]
    concurrency = options["max_concurrency"]
    return (
        f"{result['model']}, {result['load_format']} weights, {options['num_prompts']} requests of "
        f"{options['input_len']:,} tokens in and {options['output_len']} out, rate {options['request_rate']}"
        f"{'' if concurrency is None else f', concurrency {concurrency}'}, routing {options['routing']}, "
        f"{result['transport']}"
    )


def servers_words(result: dict[str, Any]) -> str:
    options = result["options"]
    return (
        f"{result['model']}, {options['num_prompts']} requests of {options['input_len']:,} tokens in and "
        f"{options['output_len']} out, concurrency {options['max_concurrency']}, `antiphon serve "
        f"{' '.join(options['serve'])}`"
    )


def overlap_table(result: dict[str, Any]) -> str:
    """One row per number of tokens and transport; times in ms, host time in us."""
    rows = []
    for step in result["results"]:
        for name, cell in step["transports"].items():
            ms, host = cell["ms"], cell["host_us_a_layer_and_lane"]
            rows.append(
                [
                    f"{step['tokens']:,}",
                    f"{name}{' (best S)' if name == step['best_serial'] else ''}",
                    *(f"{ms[arm]['median']:.2f}" for arm in ("S", "C", "M", "C2")),
                    f"{ms['D']['median']:.2f} ({ms['D']['min']:.2f} to {ms['D']['max']:.2f})",
                    *(decimal(cell[key]) for _, key in FIGURES),
                    f"{host['S']:.0f}, {host['D']:.0f}",
                ]
            )
    headings = [
        "tokens per rank",
        "transport",
        "S",
        "C",
        "M",
        "C2",
        "D",
        *(heading for heading, _ in FIGURES),
        "host S, D",
    ]
    return markdown(headings, rows, num_texts=2)


def comm_table(result: dict[str, Any]) -> str:
    """One row per size and transport; the last columns are overlap efficiencies."""
    bodies = result["options"]["beside"]
    rows = []
    for cell in result["results"]:
        time = cell["exchange_ms"]
        rows.append(
            [
                size_text(cell["size_bytes"]),
                cell["transport"],
                f"{time['median'] * 1e3:.0f} ({time['min'] * 1e3:.0f} to {time['max'] * 1e3:.0f})",
                f"{cell['gigabytes_per_s']:.3g}",
                *(decimal(cell["beside"].get(body, {}).get("overlap_efficiency")) for body in bodies),
            ]
        )
    headings = ["bytes per phase", "transport", "us per exchange", "GB/s", *(f"beside {body}" for body in bodies)]
    return markdown(headings, rows, num_texts=2)


def prefill_table(result: dict[str, Any]) -> str:
    """One row per setting of overlap."""
    rates = result["tokens_per_s_and_gpu"]
    rows = [[dbo, *(f"{rate[key]:,.0f}" for key in ("median", "worst", "best"))] for dbo, rate in rates.items()]
    return markdown(["dbo", "tokens/s per GPU, median", "worst", "best"], rows, num_texts=1)


def dbo_table(result: dict[str, Any]) -> str:
    """One row per setting of overlap, for one engine or alternating servers. Ratios are to the first setting."""
    rows = []
    for dbo, figures in result["figures"].items():
        ratios = result["ratios"].get(dbo)
        row = [dbo]
        for key, digits in (("request_throughput", 2), ("mean_ttft_ms", 0), ("p90_ttft_ms", 0)):
            told = f"{figures[key]['median']:.{digits}f}"
            row.append(told if ratios is None else f"{told} ({ratios[key]['median'] - 1:+.0%})")
        rows.append(row)
    return markdown(["dbo", "requests/s", "mean time to first token, ms", "90th percentile, ms"], rows, num_texts=1)


SECTIONS = {
    "comm": (lambda _: "", comm_table),
    "dbo": (dbo_words, dbo_table),
    "overlap": (overlap_words, overlap_table),
    "prefill throughput": (prefill_words, prefill_table),
    "serve by turns": (servers_words, dbo_table),
}
"""Kind of result -> a description of what was measured, and the table."""


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int) -> str:
    """A table whose first columns are text and whose other columns are right-aligned numbers."""
    rule = ["---"] * num_texts + ["---:"] * (len(headings) - num_texts)
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, rule, *rows])


def decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
