"""`antiphon bench dbo`: it stands here, because it starts an engine with all the engine's options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from antiphon.cli.size_option import size_option
from antiphon.cli.start import say
from antiphon.core.errors import OptionError

_TABLE_WIDTH = 140


def dbo(
    engine: dict[str, Any],
    modes: Annotated[str, typer.Option(help="Of --dbo, with commas between; all are compared with the first.")] = (
        "off,on"
    ),
    num_prompts: Annotated[int, size_option("Requests of a run.", least=1)] = 64,
    random_input_len: Annotated[int, size_option("Tokens of a prompt.", least=1)] = 512,
    random_output_len: Annotated[int, size_option("Tokens to generate for it.", least=1)] = 32,
    random_range_ratio: Annotated[
        float, typer.Option(help="How far lengths may lie from these, as a share; 0: all are equal.")
    ] = 0.0,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf: all at once.")] = float("inf"),
    capacity_share: Annotated[
        float | None,
        typer.Option(help="Instead of a rate: this share of what the first mode answers when all are sent at once."),
    ] = None,
    burstiness: Annotated[float, typer.Option(help="1: Poisson arrivals; less is burstier.")] = 1.0,
    max_concurrency: Annotated[int | None, size_option("Most requests under way at once.", least=1)] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each mode, after one to warm up.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there too.")] = None,
) -> None:
    """The same random load with overlap off and on, by turns, in one engine. The last line is one JSON object."""
    from antiphon.bench.conditions import check_writable, parse_names, write_json
    from antiphon.bench.dbo import DboOptions, print_dbo, run_dbo
    from antiphon.bench.serve.workload import Workload
    from antiphon.config.keywords import OPTION_DEFAULTS, make_config

    if engine["dbo"] != OPTION_DEFAULTS["dbo"]:
        raise OptionError(f"--dbo {engine['dbo']} is what this command varies; use --modes {engine['dbo']},...")
    config = make_config(
        {name: engine[name] for name in OPTION_DEFAULTS},
        {name: value for name, value in engine.items() if name not in OPTION_DEFAULTS},
    )
    options = DboOptions(
        workload=Workload(
            num_prompts=num_prompts,
            input_len=random_input_len,
            output_len=random_output_len,
            range_ratio=random_range_ratio,
            seed=engine["seed"],
        ),
        modes=tuple(parse_names(modes, "modes")),
        repeats=repeats,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        capacity_share=capacity_share,
    )
    check_writable(json_file, "json")
    console = Console(stderr=True)
    console.width = max(console.width, _TABLE_WIDTH)
    result = run_dbo(config, options, say=lambda text: say(console, text))
    print_dbo(result, console)
    write_json(result, json_file)
