"""Counts of tokens, requests or bytes as people type them: `32k`, `1.5M`, `20GiB`.

As in vLLM, a small letter stands for a power of 1000 and a capital one for a power of 1024: 32k is 32,000, and 32K is
32,768. Of bytes the units may be written out, as the GNU tools read them: GB is a power of 1000, GiB one of 1024.
"""

from __future__ import annotations

import re
from fractions import Fraction

from antiphon.core.errors import OptionError

_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)([kmgt])(i?b)?", re.IGNORECASE)
_NAMED = re.compile(r"(?:[^'\"]*, )?([\w-]+)[= ]")  # max_num_seqs='1.5', --max-num-seqs '1.5', or after where it stands
_WHAT_FITS = "auto"


def parse_size(value: str | int, *, shown: str = "", of_bytes: bool = False) -> int:
    """Parse a number as people type it; an integer is returned as it is. of_bytes: units may follow.

    Whether the number can work is checked where it is used. Raises `OptionError`, which begins with `shown`, such as
    "max_num_seqs='1.5'", or with the value.
    """
    shown = shown or repr(value)
    examples = "20000000, 20G or 20GiB (2**30 each), or 20g or 20GB" if of_bytes else "32768, 32K, or 32k for 32000"
    such = f"a number such as {examples}"
    what = "a number of bytes" if of_bytes else "a count"
    if value == _WHAT_FITS:
        raise _no_number(
            shown,
            "asks for what fits, which is not looked for here",
            value,
            f"leave it out for its default, or use {such}",
        )
    try:
        return int(value)
    except ValueError:
        pass
    found = _SIZE.fullmatch(str(value).strip())
    if found is None or (found[3] and not of_bytes):
        raise _no_number(shown, f"is not {what}", value, f"use {such}")
    digits, letter, unit = found.groups()
    binary = letter.isupper() if unit is None else len(unit) == len("iB")
    number = Fraction(digits) * (1024 if binary else 1000) ** _POWERS[letter.lower()]
    if number.denominator != 1:
        raise _no_number(shown, f"is {float(number):.15g}, which is not an integer", value, f"use {such}")
    return int(number)


def _no_number(shown: str, fault: str, value: int | str, remedy: str) -> OptionError:
    named = _NAMED.match(shown)
    return OptionError(f"{shown} {fault}", remedy=remedy, option=named and named[1], value=value)
