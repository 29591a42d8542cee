"""`antiphon eval ...`: problems with known answers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from antiphon.cli.arguments import size_option
from antiphon.cli.start import say, started


def word_problems(
    engine: dict[str, Any],
    num: Annotated[int | None, typer.Option(min=1, help="Solve only the first N of the 256 problems.")] = None,
    max_tokens: Annotated[int, size_option("Maximum number of tokens per answer.", least=1)] = 100,
    compare: Annotated[
        bool, typer.Option("--compare", help="Solve them with overlap off, then on, and compare the answers.")
    ] = False,
) -> None:
    """Solve the bundled word problems. Decodes greedily and counts right answers. The last line is one JSON object."""
    from antiphon.accuracy.evaluate import solve_word_problems

    console = Console(stderr=True)
    with started(console, engine) as llm:
        result = solve_word_problems(
            llm, num=num, max_tokens=max_tokens, compare=compare, say=lambda t: say(console, t)
        )
    print(json.dumps(result))
