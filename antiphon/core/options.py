"""The declaration of an option: a dataclass field with its help, its check, and how it may be written.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        ranks: int = option(1, check=whole(1), group="Model and ranks", help="Number of processes.")

    options_of(Options)["ranks"].help

Signatures, the command line, the config file and the tables in the docs are all generated from `options_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, get_type_hints

from antiphon.core.errors import OptionError, is_number, is_whole, out_of_range, unknown_value
from antiphon.core.sizes import joined_sizes, parse_size

Check = Callable[[str, object], None]
"""A function of an option's name and value that raises `OptionError` for a value that can never work."""

_KEY = "option"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option. name: the one that users type. field: the dataclass field that declares it.

    size: "count" or "bytes" if it may be written as a size, such as "32k"; "list" if it is a text such as "1,2,4" that
    may be written as a list of numbers. doc: what docs/options.md adds to `help`.
    shown_default: how the docs write the default.
    """

    name: str = ""
    field: str = ""
    type: Any = None
    default: Any
    help: str
    group: str
    doc: str = ""
    shown_default: str = ""
    check: Check | None = None
    size: str = ""

    @property
    def accepts(self) -> Any:
        """The type of value that a caller may pass."""
        if self.size == "list":
            return self.type | int | list[int]
        return self.type | str if self.size else self.type

    def check_value(self, value: object) -> None:
        """Raises `OptionError` for a value that can never work. `None` is valid where it is the default."""
        if self.check is not None and (value is not None or self.default is not None):
            self.check(self.name, value)

    def parse(self, value: Any, *, alias: str = "") -> Any:
        """Parse a string that stands for a size, and join a list; return other values as they are.

        alias: how the user calls it.
        """
        if self.size == "list":
            return joined_sizes(value)
        if not self.size or not isinstance(value, str):
            return value
        return parse_size(value, alias or self.name, of_bytes=self.size == "bytes")


def option(default: Any, *, name: str = "", **about: Any) -> Any:
    """A dataclass field that is an option, with the parameters of `Option`.

    name: defaults to the field's name. group: defaults to that of the previous option.
    """
    return field(default=default, metadata={_KEY: {"default": default, "name": name, **about}})


@cache
def options_of(declaration: type) -> Mapping[str, Option]:
    """The options that a dataclass declares, by the name that users type."""
    hints = get_type_hints(declaration)
    found, group = {}, ""
    for one in fields(declaration):
        if _KEY in one.metadata:
            about = one.metadata[_KEY]
            name = about["name"] or one.name
            group = about.get("group", group)
            found[name] = Option(**{**about, "name": name, "field": one.name, "type": hints[one.name], "group": group})
    return MappingProxyType(found)


def check_options(instance: Any) -> None:
    """Check each option on its own. Raises `OptionError` for the first value that can never work."""
    for one in options_of(type(instance)).values():  # type: ignore[arg-type]  # classes are hashable
        one.check_value(getattr(instance, one.field))


# ---- checks


def one_of(names: Iterable[str]) -> Check:
    valid = tuple(names)

    def check(name: str, value: object) -> None:
        if value not in valid:
            raise unknown_value(name, value, valid)

    return check


def whole(least: int, most: int | None = None) -> Check:
    """An integer from `least` to `most`."""
    remedy = f"an integer of at least {least}" if most is None else f"{least} to {most}"

    def check(name: str, value: object) -> None:
        if not is_whole(value) or value < least or (most is not None and value > most):
            raise out_of_range(name, value, remedy)

    return check


def number(least: float, most: float, *, without_least: bool = False) -> Check:
    """A number from `least` to `most`; without_least: above `least`."""
    remedy = f"a number {'above' if without_least else 'from'} {least}{', at most' if without_least else ' to'} {most}"

    def check(name: str, value: object) -> None:
        if not is_number(value) or not least <= value <= most or (without_least and value == least):
            raise out_of_range(name, value, remedy)

    return check


def instance_of(kind: type, remedy: str) -> Check:
    def check(name: str, value: object) -> None:
        if not isinstance(value, kind):
            raise OptionError(f"{name}={value!r} has the wrong type", remedy=f"use {remedy}", option=name, value=value)

    return check
