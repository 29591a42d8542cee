"""The kind of option that counts tokens, requests or bytes, for typer: `--max-model-len 32k`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from antiphon.core.errors import OptionError
from antiphon.core.sizes import parse_size


@dataclass(frozen=True, slots=True)
class Size:
    """What typer calls with the text of the option. least: the smallest number that is taken."""

    least: int | None
    of_bytes: bool
    __name__ = "size"

    def __call__(self, value: str | int) -> int:
        try:
            number = parse_size(value, of_bytes=self.of_bytes)
        except OptionError as error:
            raise typer.BadParameter(str(error)) from None
        if self.least is not None and number < self.least:
            raise typer.BadParameter(f"{value} is too small; use at least {self.least}")
        return number


def size_option(help: str, *, least: int | None = None, of_bytes: bool = False) -> Any:
    """`typer.Option` of an integer that may be written as a size."""
    return typer.Option(help=help, parser=Size(least, of_bytes), metavar="BYTES" if of_bytes else "COUNT")
