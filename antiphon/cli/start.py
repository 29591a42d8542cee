"""Starts an engine with progress and the start-up block on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from antiphon.frontend.llm import LLM


@contextmanager
def started(console: Console, engine: dict[str, Any]) -> Iterator[LLM]:
    """An engine with these options of `LLM`, closed at the end of the `with` block."""
    from antiphon.config.describe import describe_config
    from antiphon.frontend.llm import LLM  # it loads the tokenizers

    with ExitStack() as stack:
        status = console.status("starting")

        def show(what: str) -> None:
            if not console.is_terminal:
                return
            # Not before the first call: until then the hub library shows its own progress bars.
            status.start()
            stack.callback(status.stop)
            status.update(Text(what))

        llm = LLM(**engine, on_start=show)
    with llm:
        for heading, text in describe_config(llm.config):
            say(console, f"{heading + ':':<11}{text}")
        yield llm


def say(console: Console, text: str) -> None:
    """Print a text verbatim, without markup, emoji codes, colors or added line breaks."""
    console.print(Text(text), soft_wrap=True)
