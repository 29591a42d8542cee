"""Preprocesses the command line for typer, and reads the YAML file of `--config`.

It separates options of other engines from ours and suggests the nearest option for an unknown one. Typer still parses
our own options. This module knows an option only by its kind: flag, whole, count or bytes (integers that may be
written as 32k), sizes (a text of one or more integers), number, text, or json. Kinds that may be repeated are texts and
wholes; words also takes several texts at once, and sizes several integers.
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
from antiphon.core.sizes import joined_sizes, parse_size

CONFIG_FLAG = "--config"

SEVERAL_WORDS = "several words"
"""Marks a list option that takes all words up to the next option, as in `--served-model-name a b`."""

SIZE_LIST = "several sizes"
"""Marks a text option that takes all numbers that follow it, as in `--cuda-graph-sizes 1 2 4`, joined by commas."""

_NEGATION = "no_"
_SIZES = ("count", "bytes")
_LISTS = {"texts": "text", "words": "text", "wholes": "whole"}
_WHAT = {
    "flag": "true or false",
    "whole": "an integer",
    "count": "an integer or such as 32k",
    "bytes": "an integer or such as 20GiB",
    "sizes": "a list such as 1,2,4",
    "number": "a number",
    "text": "a text",
    "json": "JSON",
    "texts": "a text",
    "words": "texts",
    "wholes": "an integer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnOption:
    """One of our options as typer declares it. negative: the flags that turn it off."""

    name: str
    kind: str
    flags: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(slots=True)
class Arguments:
    """A command line, separated: words for typer in order, foreign options by name, and the path of `--config`."""

    ours: list[str] = field(default_factory=list)
    foreign: dict[str, Any] = field(default_factory=dict)
    config: str | None = None


def json_object(name: str, text: str | None, *, example: str) -> dict[str, Any]:
    """Parse the JSON object of an option; `None` gives an empty one. Raises `OptionError` for anything else."""
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        flag = f"--{name.replace('_', '-')}"
        fact = f"{flag} {text!r} is not a JSON object"
        raise OptionError(fact, remedy=f"use one such as '{example}'", option=flag, value=text)
    return value


def separate(words: Sequence[str], options: Sequence[OwnOption]) -> Arguments:
    """Separate the words of a command line. Underscores in an option's name count as dashes.

    Raises `OptionError` for an unknown option, and for a foreign one that lacks its value.
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
                # As in argparse, the word after `--name=a` is the MODEL, unless that was already given.
                more = _words(left) if has_argument or not equals else []
                found.ours += [f"{flag}={one}" for one in _texts(flag, [text] * bool(equals) + more)]
                continue
            if kind == "sizes":
                found.ours.append(f"{flag}={_sizes(flag, text if equals else '', left)}")
                continue
            values = [] if equals or kind == "flag" else [_next(flag, kind, left)]
            _check(flag, kind, values[0] if values else text)
            found.ours += [flag + equals + text, *values]
            if flag == CONFIG_FLAG:
                found.config = text if equals else "".join(values)
            continue
        name, value = _keyword(flag), True
        option = foreign_option(name)
        if option is None and name.startswith(_NEGATION):
            name, value = name.removeprefix(_NEGATION), False
            option = foreign_option(name)
        if option is None or (not value and option.kind != "flag"):
            raise unknown_option(_keyword(flag), [_keyword(own) for own in by_flag], dashes=True)
        if option.kind == "flag":
            found.foreign[name] = value if not equals else _from_text(flag, "flag", text.lower()) is value
            continue
        if option.kind == "words":
            found.foreign[name] = _texts(flag, [text] if equals else _words(left))
            continue
        if option.kind == "sizes":
            found.foreign[name] = _sizes(flag, text if equals else "", left)
            continue
        found.foreign[name] = _from_text(flag, option.kind, text if equals else _next(flag, option.kind, left))
    return found


def _keyword(flag: str) -> str:
    """The keyword argument of a flag: `max_num_seqs` for `--max-num-seqs`."""
    return flag.lstrip("-").replace("-", "_")


def _parts(word: str) -> tuple[str, str, str]:
    """The flag, "=" if there is one, and the text after it. vLLM's `-O0` means `-O=0`."""
    if re.fullmatch(r"-O\d+", word):
        return "-O", "=", word[2:]
    flag, equals, text = word.partition("=")
    return flag.replace("_", "-"), equals, text


def _words(left: list[str]) -> list[str]:
    """Remove the words up to the next option from `left` and return them."""
    count = next((place for place, word in enumerate(left) if word.startswith("-")), len(left))
    taken, left[:] = left[:count], left[count:]
    return taken


def _sizes(flag: str, text: str, left: list[str]) -> str:
    """`text`, or the numbers at the beginning of `left`, which are removed from it; a JSON list is joined too."""
    words = [text or _next(flag, "sizes", left)]
    while not text and left and re.fullmatch(r"[\d,]+", left[0]):
        words.append(left.pop(0))
    return ",".join(words).strip("[]").replace(" ", "")


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
                f"{flag} {word!r} is not a JSON list",
                limit=str(error),
                remedy=f"use {flag} a b",
                option=flag,
                value=word,
            ) from None
        texts += [_value(flag, "text", item) for item in items]
    return texts


def _next(flag: str, kind: str, left: list[str]) -> str:
    if not left:
        raise OptionError(f"{flag} needs a value", remedy=f"use {flag} and {_WHAT[kind]}", option=flag)
    return left.pop(0)


def _check(flag: str, kind: str, text: str) -> None:
    """Check a value that typer will parse: its own error takes five lines."""
    if kind in _SIZES:
        parse_size(text, flag, of_bytes=kind == "bytes")
    try:
        {"whole": int, "wholes": int, "number": float}.get(kind, str)(text)
    except ValueError:
        raise _wrong_type(flag, kind, text) from None


def _from_text(flag: str, kind: str, text: str) -> Any:
    try:
        value = text if kind in ("text", *_SIZES) else json.loads(text)
    except json.JSONDecodeError:
        raise _wrong_type(flag, kind, text) from None
    return _value(flag, kind, value)


@dataclass(slots=True)
class ConfigFile:
    """The options of a file: `own` by typer's name, `foreign` by their own."""

    own: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, Any] = field(default_factory=dict)


def read_config_file(path: str, options: Sequence[OwnOption]) -> ConfigFile:
    """Read a YAML file of options by name, with dashes or underscores.

    Raises `OptionError` that names the line for a malformed file, an unknown option, or a value of the wrong type.
    """
    known: dict[str, tuple[OwnOption, bool]] = {}
    for option in options:
        known |= {_keyword(flag): (option, True) for flag in option.flags}
        known |= {_keyword(flag): (option, False) for flag in option.negative}
        known.setdefault(option.name, (option, True))
    found = ConfigFile()
    for name, node, value, where in _entries(path):
        if value is None:
            continue
        if name in known and name != _keyword(CONFIG_FLAG):
            option, positive = known[name]
            # Texts are taken verbatim: YAML would make a bool of `dbo: on`, and a number of `revision: 1`.
            plain = option.kind in ("text", "texts", "words") and isinstance(node, yaml.ScalarNode)
            value = _value(name, option.kind, node.value if plain else value, f"{where}, ")
            found.own[option.name] = value if positive else not value
        elif (foreign := foreign_option(name)) is not None:
            plain = foreign.kind == "text" and isinstance(node, yaml.ScalarNode)
            found.foreign[name] = _value(name, foreign.kind, node.value if plain else value, f"{where}, ")
        else:
            unknown = unknown_option(name, known)
            raise OptionError(f"{where}: {unknown.fact}", remedy=unknown.remedy, option=name)
    return found


def _entries(path: str) -> list[tuple[str, yaml.Node, Any, str]]:
    """(name, node, value, where) of each entry of the file's mapping."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_file(path, "cannot be read", str(error), "pass a YAML file of options") from error
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        limit = f"it has the character {chr(error.character)!r}"
        raise _bad_file(f"{path}, line {number}", "is not YAML", limit, "remove it") from error
    try:
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise _bad_file(path, "is not a list of options", "", "write one per line, such as `ranks: 2`")
        entries, seen = [], set()
        for key, node in root.value:
            name = str(key.value).replace("-", "_") if isinstance(key, yaml.ScalarNode) else str(key)
            where = f"{CONFIG_FLAG} {path}, line {key.start_mark.line + 1}"
            if name in seen:
                raise OptionError(f"{where}: {name} is given twice", remedy="leave one of them out", option=name)
            seen.add(name)
            entries.append((name, node, _constructed(loader, node, name, where), where))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _bad_file(f"{path}{line}", "is not YAML", str(error.problem), "correct it") from error
    except RecursionError:
        raise _bad_file(path, "is nested too deeply", "", "write one option per line") from None
    finally:
        loader.dispose()
    return entries


def _bad_file(place: str, fault: str, limit: str, remedy: str) -> OptionError:
    return OptionError(f"{CONFIG_FLAG} {place} {fault}", limit=limit, remedy=remedy, option=CONFIG_FLAG)


def _constructed(loader: yaml.SafeLoader, node: yaml.Node, name: str, where: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, LookupError, AttributeError, OverflowError) as error:  # e.g. 2024-13-01 or !!bool perhaps
        fact = f"{where}, {name} does not have the type that YAML gives it"
        raise OptionError(fact, limit=str(error), remedy="quote a text", option=name) from error


def _value(option: str, kind: str, value: Any, where: str = "") -> Any:
    """Return the value after checking its kind; always a list for options that can be repeated."""
    if kind in _LISTS:
        return [_value(option, _LISTS[kind], item, where) for item in (value if isinstance(value, list) else [value])]
    if kind == "sizes":
        value = joined_sizes(value)
    if kind in _SIZES and isinstance(value, str):
        return parse_size(value, option, where=where, of_bytes=kind == "bytes")
    right = {
        "flag": isinstance(value, bool),
        "whole": is_whole(value),
        "count": is_whole(value),
        "bytes": is_whole(value),
        "number": is_number(value),
        "text": isinstance(value, str),
        "sizes": isinstance(value, str),
        "json": isinstance(value, Mapping) or is_whole(value),
    }[kind]
    if not right:
        raise _wrong_type(option, kind, value, where)
    return value


def _wrong_type(option: str, kind: str, value: Any, where: str = "") -> OptionError:
    fact = f"{where}{option}={value!r} is not {_WHAT[kind]}"
    return OptionError(fact, remedy=f"use {_WHAT[kind]}", option=option, value=value)


@dataclass(frozen=True, slots=True)
class Size:
    """Parses a size for typer. least: the smallest valid number."""

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
    """A `typer.Option` for an integer that may be written as a size."""
    return typer.Option(help=help, parser=Size(least, of_bytes), metavar="BYTES" if of_bytes else "COUNT")
