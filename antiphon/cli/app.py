"""The commands of `antiphon`, and how they end on an error. Heavy imports wait until a command runs."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer
from rich.console import Console

import antiphon
from antiphon.cli.bench import bench_app, dbo
from antiphon.cli.engine_options import engine_command
from antiphon.cli.evaluate import word_problems
from antiphon.cli.generate import generate
from antiphon.cli.serve import serve
from antiphon.core.errors import AntiphonError

_USAGE_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Mixture-of-Experts inference with dual-batch overlap.",
)
eval_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Solve problems with known answers.",
)
engine_command(app)(generate)
engine_command(app)(serve)
engine_command(eval_app, "word-problems")(word_problems)
engine_command(bench_app)(dbo)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The console script: an error is one line on stderr; exit code 2 for the user's, 1 for the engine's."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does, so that one character cannot lose a result
    try:
        app()
    except AntiphonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE_ERROR if isinstance(error, ValueError) else 1)
    except OSError as error:  # for example, a full disk
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"antiphon {antiphon.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mixture-of-Experts inference with dual-batch overlap."""


@app.command()
def demo() -> None:
    """Show what overlap gains. Solves word problems and tells a story on 2 ranks, over a simulated link."""
    from antiphon.cli.demo import run_demo

    run_demo(Console())


@app.command()
def doctor(
    ranks: Annotated[
        int | None, typer.Option(help="Processes, one device each. Default: one per GPU, or 2 without GPUs.")
    ] = None,
    no_peer_access: Annotated[
        bool, typer.Option("--no-peer-access", help="Assume that GPUs have no peer access.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all facts.")] = False,
) -> None:
    """Check what this machine supports. Shows which transports work and what would help. Starts no ranks."""
    from antiphon.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(Console(), ranks=ranks, peer_access=not no_peer_access, as_json=as_json))
