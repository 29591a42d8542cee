"""Counts of tokens, requests or bytes as people type them: `32k`, `1.5M`, `20GiB`.

As in vLLM, a lowercase letter stands for a power of 1000 and an uppercase one for a power of 1024: 32k is 32,000, and
32K is 32,768. Sizes in bytes may have a full unit, read as the GNU tools do: GB is a power of 1000, GiB one of 1024.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from antiphon.core.errors import OptionError, is_whole

_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)([kmgt])(i?b)?", re.IGNORECASE)
_WHAT_FITS = "auto"


def parse_size(value: str | int, option: str | None = None, *, where: str = "", of_bytes: bool = False) -> int:
    """Parse a number as people type it; an integer is returned as it is. of_bytes: allow units of bytes.

    The range is checked where the number is used. Raises `OptionError` for anything else. Its sentence begins with
    `where`, such as "--config FILE, line 3, ", and the option.
    """
    shown = f"{where}{option}={value!r}" if option else repr(value)
    examples = "20000000, 20G or 20GiB (2**30 each), or 20g or 20GB" if of_bytes else "32768, 32K, or 32k for 32000"
    remedy = f"use a number such as {examples}"
    if value == _WHAT_FITS:
        raise asks_for_what_fits(shown, option, value, remedy)
    try:
        return int(value)
    except ValueError:
        found = _SIZE.fullmatch(str(value).strip())
    if found is None or (found[3] and not of_bytes):
        fact = f"{shown} is not {'a number of bytes' if of_bytes else 'a count'}"
        raise OptionError(fact, remedy=remedy, option=option, value=value)
    digits, letter, unit = found.groups()
    binary = letter.isupper() if unit is None else len(unit) == len("iB")
    number = Fraction(digits) * (1024 if binary else 1000) ** _POWERS[letter.lower()]
    if number.denominator != 1:
        fact = f"{shown} is {float(number):.15g}, which is not an integer"
        raise OptionError(fact, remedy=remedy, option=option, value=value)
    return int(number)


def joined_sizes(value: Any) -> Any:
    """A list of numbers as one text, "1,2,4", and a number as a text; other values as they are."""
    if isinstance(value, list | tuple) and all(is_whole(item) or isinstance(item, str) for item in value):
        return ",".join(map(str, value))
    return str(value) if is_whole(value) else value


def asks_for_what_fits(shown: str, option: str | None, value: object, remedy: str = "use a number") -> OptionError:
    """The error for "auto", and for what other engines write for it."""
    fact = f"{shown} asks for the largest size that fits, which is not supported"
    return OptionError(fact, remedy=f"leave it out for its default, or {remedy}", option=option, value=value)
