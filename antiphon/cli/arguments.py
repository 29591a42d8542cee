"""Reads the command line and a YAML file before typer does.

It parts options of other engines from ours, names the nearest option for one that is not known, and reads the file of
`--config`. What typer says of our own options stays typer's. Knows options only by their kind: flag, whole, count or
bytes (a whole number that may be written as 32k), number, text, json; texts and wholes for those that may be given
several times, words for those that also take several texts at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml

from antiphon.config.aliases import foreign_option, unknown_option
from antiphon.core.errors import OptionError, is_number, is_whole
from antiphon.core.sizes import parse_size

CONFIG_FLAG = "--config"

SEVERAL_WORDS = "several words"
"""In the annotation of a list of texts: it takes all words up to the next option, `--served-model-name a b`."""

_NEGATION = "no_"
_SIZES = ("count", "bytes")
_LISTS = {"texts": "text", "words": "text", "wholes": "whole"}
_WHAT = {
    "flag": "true or false",
    "whole": "an integer",
    "count": "an integer or such as 32k",
    "bytes": "an integer or such as 20GiB",
    "number": "a number",
    "text": "a text",
    "json": "JSON",
    "texts": "a text",
    "words": "texts",
    "wholes": "an integer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnOption:
    """One of our options as typer knows it. negative: the flags that turn it off."""

    name: str
    kind: str
    flags: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(slots=True)
class Arguments:
    """`ours` for typer, in their order; `foreign` by name; the path after `--config`."""

    ours: list[str] = field(default_factory=list)
    foreign: dict[str, Any] = field(default_factory=dict)
    config: str | None = None


def json_object(name: str, text: str | None, *, example: str) -> dict[str, Any]:
    """The JSON object of an option; empty for `None`. Raises `OptionError` for anything else."""
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise OptionError(
            f"--{name.replace('_', '-')} {text!r} is not a JSON object", remedy=f"use one such as '{example}'"
        )
    return value


def separate(words: Sequence[str], options: Sequence[OwnOption]) -> Arguments:
    """Sort the words of a command line. Underscores in an option's name are dashes.

    Raises `OptionError` for an option that nobody knows, and for a foreign one without the value that it needs.
    """
    by_flag = {flag: option for option in options for flag in (*option.flags, *option.negative)}
    found = Arguments()
    left = list(words)
    has_argument = False
    while left:
        word = left.pop(0)
        if word == "--":
            found.ours += [word, *left]
            break
        if not word.startswith("-") or word == "-" or word == "--help":
            has_argument |= word != "--help"
            found.ours.append(word)
            continue
        flag, equals, text = _parts(word)
        if flag in by_flag:
            kind = by_flag[flag].kind
            if kind == "words":
                # As argparse has it, a word after `--name=a` is the MODEL, unless that is known already.
                more = _words(left) if has_argument or not equals else []
                found.ours += [f"{flag}={one}" for one in _texts(flag, [text] * bool(equals) + more)]
                continue
            values = [] if equals or kind == "flag" else [_next(flag, kind, left)]
            _check(flag, kind, values[0] if values else text)
            found.ours += [flag + equals + text, *values]
            if flag == CONFIG_FLAG:
                found.config = text if equals else "".join(values)
            continue
        name, value = flag.lstrip("-").replace("-", "_"), True
        option = foreign_option(name)
        if option is None and name.startswith(_NEGATION):
            name, value = name.removeprefix(_NEGATION), False
            option = foreign_option(name)
        if option is None or (not value and option.kind != "flag"):
            raise unknown_option(flag.lstrip("-").replace("-", "_"), _names(options), dashes=True)
        if option.kind == "flag":
            found.foreign[name] = value if not equals else _from_text(flag, "flag", text.lower()) is value
            continue
        if option.kind == "words":
            found.foreign[name] = _texts(flag, [text] if equals else _words(left))
            continue
        found.foreign[name] = _from_text(flag, option.kind, text if equals else _next(flag, option.kind, left))
    return found


def _parts(word: str) -> tuple[str, str, str]:
    """The flag, "=" if there is one, and what follows it. `-O0` is vLLM's `-O=0`."""
    if re.fullmatch(r"-O\d+", word):
        return "-O", "=", word[2:]
    flag, equals, text = word.partition("=")
    return flag.replace("_", "-"), equals, text


def _words(left: list[str]) -> list[str]:
    """Take the words up to the next option."""
    count = next((place for place, word in enumerate(left) if word.startswith("-")), len(left))
    taken, left[:] = left[:count], left[count:]
    return taken


def _texts(flag: str, words: Sequence[str]) -> list[str]:
    """The words, with each JSON list replaced by its items."""
    if not words:
        raise OptionError(f"{flag} needs at least one value", remedy=f"use {flag} NAME [NAME ...]", option=flag)
    texts = []
    for word in words:
        try:
            items = json.loads(word) if word.startswith("[") else [word]
        except json.JSONDecodeError as error:
            raise OptionError(
                f"{flag} {word!r} is not a JSON list", limit=str(error), remedy=f"use {flag} a b", option=flag
            ) from None
        texts += [_value(f"{flag} {word!r}", "text", item) for item in items]
    return texts


def _names(options: Sequence[OwnOption]) -> list[str]:
    return [flag.lstrip("-").replace("-", "_") for option in options for flag in (*option.flags, *option.negative)]


def _next(flag: str, kind: str, left: list[str]) -> str:
    if not left:
        raise OptionError(f"{flag} needs a value", remedy=f"use {flag} and {_WHAT[kind]}", option=flag)
    return left.pop(0)


def _check(flag: str, kind: str, text: str) -> None:
    """Check a value that typer will read: its own error takes five lines."""
    if kind in _SIZES:
        parse_size(text, shown=f"{flag} {text!r}", of_bytes=kind == "bytes")
    try:
        {"whole": int, "wholes": int, "number": float}.get(kind, str)(text)
    except ValueError:
        raise OptionError(f"{flag} {text!r} is not {_WHAT[kind]}", remedy=f"use {_WHAT[kind]}", option=flag) from None


def _from_text(flag: str, kind: str, text: str) -> Any:
    if kind == "text":
        return text
    if kind in _SIZES:
        return parse_size(text, shown=f"{flag} {text!r}", of_bytes=kind == "bytes")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise OptionError(f"{flag} {text!r} is not {_WHAT[kind]}", remedy=f"use {_WHAT[kind]}", option=flag) from None
    return _value(flag, kind, value)


@dataclass(slots=True)
class ConfigFile:
    """`own` by typer's name, `foreign` by theirs."""

    own: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, Any] = field(default_factory=dict)


def read_config_file(path: str, options: Sequence[OwnOption]) -> ConfigFile:
    """A YAML file of options by name, with dashes or underscores.

    Raises `OptionError`, with the line, for what is no such file, for an unknown option, and for a value of the wrong
    type.
    """
    known: dict[str, tuple[OwnOption, bool]] = {}
    for option in options:
        known |= {flag.lstrip("-").replace("-", "_"): (option, True) for flag in option.flags}
        known |= {flag.lstrip("-").replace("-", "_"): (option, False) for flag in option.negative}
        known.setdefault(option.name, (option, True))
    found = ConfigFile()
    for name, node, value, where in _entries(path):
        if value is None:
            continue
        if name in known and name != CONFIG_FLAG.lstrip("-"):
            option, positive = known[name]
            # What is a text is taken as it stands: YAML makes a bool of `dbo: on`, and a number of `revision: 1`.
            plain = option.kind in ("text", "texts", "words") and isinstance(node, yaml.ScalarNode)
            value = _value(f"{where}, {name}", option.kind, node.value if plain else value)
            found.own[option.name] = value if positive else not value
        elif (foreign := foreign_option(name)) is not None:
            plain = foreign.kind == "text" and isinstance(node, yaml.ScalarNode)
            found.foreign[name] = _value(f"{where}, {name}", foreign.kind, node.value if plain else value)
        else:
            unknown = unknown_option(name, known)
            raise OptionError(f"{where}: {unknown.fact}", remedy=unknown.remedy, option=name)
    return found


def _entries(path: str) -> list[tuple[str, yaml.Node, Any, str]]:
    """(name, node, value, where) of every line of the file's one mapping."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{CONFIG_FLAG} {path} cannot be read",
            limit=str(error),
            remedy="pass a YAML file of options",
            option=CONFIG_FLAG,
        ) from error
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise OptionError(
            f"{CONFIG_FLAG} {path}, line {line_number} is not YAML",
            limit=f"it has the character {chr(error.character)!r}",
            remedy="remove it",
            option=CONFIG_FLAG,
        ) from error
    try:
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise OptionError(
                f"{CONFIG_FLAG} {path} is not a list of options",
                remedy="write one per line, such as `ranks: 2`",
                option=CONFIG_FLAG,
            )
        entries, seen = [], set()
        for key, node in root.value:
            name = str(key.value).replace("-", "_") if isinstance(key, yaml.ScalarNode) else str(key)
            where = f"{CONFIG_FLAG} {path}, line {key.start_mark.line + 1}"
            if name in seen:
                raise OptionError(f"{where}: {name} is given twice", remedy="leave one of them out", option=name)
            seen.add(name)
            entries.append((name, node, _constructed(loader, node, f"{where}, {name}"), where))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise OptionError(
            f"{CONFIG_FLAG} {path}{line} is not YAML", limit=str(error.problem), remedy="correct it", option=CONFIG_FLAG
        ) from error
    except RecursionError:
        raise OptionError(
            f"{CONFIG_FLAG} {path} is nested too deeply", remedy="write one option per line", option=CONFIG_FLAG
        ) from None
    finally:
        loader.dispose()
    return entries


def _constructed(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, LookupError, AttributeError, OverflowError) as error:  # of 2024-13-01, of !!bool perhaps
        raise OptionError(
            f"{where} does not have the type that YAML gives it", limit=str(error), remedy="quote a text"
        ) from error


def _value(where: str, kind: str, value: Any) -> Any:
    """The value, checked to be of this kind; always a list for options that can be repeated."""
    if kind in _LISTS:
        return [_value(where, _LISTS[kind], item) for item in (value if isinstance(value, list) else [value])]
    if kind in _SIZES and isinstance(value, str):
        return parse_size(value, shown=f"{where}={value!r}", of_bytes=kind == "bytes")
    right = {
        "flag": isinstance(value, bool),
        "whole": is_whole(value),
        "count": is_whole(value),
        "bytes": is_whole(value),
        "number": is_number(value),
        "text": isinstance(value, str),
        "json": isinstance(value, Mapping) or is_whole(value),
    }[kind]
    if not right:
        raise OptionError(f"{where}={value!r} is not {_WHAT[kind]}", remedy=f"use {_WHAT[kind]}", value=value)
    return value


@dataclass(frozen=True, slots=True)
class Size:
    """Parses the text of an option for typer. least: the smallest valid number."""

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
    """A `typer.Option` for an integer that can be written as a size."""
    return typer.Option(help=help, parser=Size(least, of_bytes), metavar="BYTES" if of_bytes else "COUNT")
