"""Lines of text files, records and messages end at LF, CR LF or CR, and nowhere else.

`str.splitlines` also ends a line at a form feed, U+0085, U+2028 and others. Texts contain these characters, and JSON
need not escape them, so this project uses neither it nor readers that rely on it (tests/core/test_lines.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

JSON_ESCAPES = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""For `str.translate`: line ends of some readers that JSON need not escape. It always escapes control characters."""

_LINE_END = re.compile(r"\r\n|\r|\n")
_ANY_LINE_END = re.compile(r"[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
_JSON_SPACE = " \t"


def split_lines(text: str) -> list[str]:
    """Split a text into lines, without their line ends. The last line needs none; an empty text has no lines."""
    lines = _LINE_END.split(text)
    if not lines[-1]:
        lines.pop()
    return lines


def one_line(text: str) -> str:
    """The text as one line for every reader: a space replaces anything that some reader takes for a line end."""
    return _ANY_LINE_END.sub(" ", text).strip(" ")


def json_lines(text: str, what: str = "JSON") -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the parsed value of each line that is not blank.

    Raises `ValueError` for invalid JSON: "line 3 is not `what` (why)".
    """
    for number, line in enumerate(split_lines(text), start=1):
        if not line.strip(_JSON_SPACE):
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not {what} ({error.msg}, column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number with thousands of digits, or nesting that is too deep
            raise ValueError(f"line {number} is not {what} ({error})") from error


def escape_json_lines(content: bytes) -> bytes:
    """Escape JSON in UTF-8 so that it is one line for every reader. Costs next to nothing for ASCII.

    These characters occur in JSON only inside strings, so they can be replaced wherever they stand.
    """
    if content.isascii():
        return content
    # Searching for the first byte alone makes this cheap for texts without such characters.
    if b"\xc2" in content:
        content = content.replace(b"\xc2\x85", b"\\u0085")
    if b"\xe2" in content:
        content = content.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return content
