"""`antiphon bench comm`: how fast each transport moves tokens, alone and beside computation.

Only the link part of the transports runs: copies, flags and waits. What each rank runs is in `rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from antiphon.bench.conditions import conditions
from antiphon.bench.measures import Summary, gigabytes_per_s, overlap_efficiency, slowest_rank
from antiphon.bench.ranks import run_on_ranks
from antiphon.comm.needs import peer_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class CommOptions:
    """The resolved options of `antiphon bench comm`."""

    ranks: int
    device: str
    transports: list[str]
    sizes: list[int]  # bytes that a rank sends to its peers in a dispatch
    beside: list[str]  # computations
    beside_from: int  # smallest size, in bytes, that is measured beside computation
    hidden_size: int
    repeats: int
    peer_access: bool
    timeout_s: float


def run_comm(options: CommOptions) -> dict[str, Any]:
    """Measure, and return the result as one JSON object."""
    results = run_on_ranks(
        "antiphon.bench.comm.rank:measure_exchanges",
        ranks=options.ranks,
        device=options.device,
        options=asdict(options),
        timeout_s=options.timeout_s,
        environment=peer_environment(peer_access=options.peer_access),
    )
    return {
        "bench": "comm",
        "what": (
            "one exchange is a dispatch and its combine, link part only, every token to every rank, lanes alternating; "
            "medians of the slowest rank, arms interleaved in one run"
        ),
        **conditions(results, asdict(options)),
        "results": summarize_exchanges([result["cells"] for result in results]),
    }


def summarize_exchanges(cells_by_rank: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Summarize each cell: the slowest rank in each repeat, and the figures derived from it."""
    return [_summarize(cells) for cells in zip(*cells_by_rank, strict=True)]


def _summarize(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = cells[0]
    exchange = Summary.of(slowest_rank([cell["exchange_ms"] for cell in cells]))
    num_bytes = max(cell["num_bytes"] for cell in cells)
    beside = {}
    for name, body in first["beside"].items():
        compute = Summary.of(slowest_rank([cell["beside"][name]["compute_ms"] for cell in cells]))
        both = Summary.of(slowest_rank([cell["beside"][name]["both_ms"] for cell in cells]))
        beside[name] = {
            "size": body["size"],
            "units": body["units"],
            "compute_ms": compute.to_dict(),
            "both_ms": both.to_dict(),
            "overlap_efficiency": overlap_efficiency(compute.median, exchange.median, both.median),
        }
    return {
        "transport": first["transport"],
        "size_bytes": first["size_bytes"],
        "tokens": first["tokens"],
        "exchanges": first["exchanges"],
        "num_bytes": num_bytes,
        "exchange_ms": exchange.to_dict(),
        "gigabytes_per_s": gigabytes_per_s(num_bytes, exchange.median),
        "beside": beside,
    }


def print_exchanges(result: dict[str, Any], console: Console) -> None:
    """Print a table with one row per size and transport."""
    bodies = result["options"]["beside"]
    table = Table(
        title=f"{len(result['devices'])} x {result['devices'][0]}: bytes per rank and phase; overlap efficiency beside",
        title_justify="left",
    )
    table.add_column("size", no_wrap=True)
    table.add_column("transport", overflow="fold")
    for heading in ("us per exchange", "min to max", "GB/s", *bodies):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in result["results"]:
        time = cell["exchange_ms"]
        efficiencies = [cell["beside"].get(body, {}).get("overlap_efficiency") for body in bodies]
        table.add_row(
            size_text(cell["size_bytes"]),
            Text(cell["transport"]),
            f"{time['median'] * 1e3:.0f}",
            f"{time['min'] * 1e3:.0f} to {time['max'] * 1e3:.0f}",
            f"{cell['gigabytes_per_s']:.3g}",
            *("" if value is None else f"{value:.2f}" for value in efficiencies),
        )
    console.print(table)


def size_text(num_bytes: int) -> str:
    """A size in the largest binary unit that divides it, such as 4K."""
    for unit, name in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if num_bytes % unit == 0:
            return f"{num_bytes // unit}{name}"
    return str(num_bytes)
