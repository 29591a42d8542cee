"""What a line is in text files, records and messages: it ends at LF, CR LF or CR, and nowhere else.

`str.splitlines` also ends a line at a form feed, U+0085, U+2028 and others. Texts hold these characters, and JSON may
leave them as they are, so nothing in this project uses it, nor a reader that does (tests/core/test_lines.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

JSON_ESCAPES = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""For `str.translate`: what JSON may leave as it is though some readers take it for the end of a line. Control
characters JSON escapes anyway.
"""

_LINE_END = re.compile(r"\r\n|\r|\n")
_ANY_LINE_END = re.compile(r"[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
_JSON_SPACE = " \t"


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their line ends. The last line needs none; an empty text has no lines."""
    lines = _LINE_END.split(text)
    if not lines[-1]:
        lines.pop()
    return lines


def one_line(text: str) -> str:
    """The text as one line for every reader, whatever it takes for the end of one: a space instead."""
    return _ANY_LINE_END.sub(" ", text).strip(" ")


def json_lines(text: str, what: str = "JSON") -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the value of each line that is not blank.

    Raises `ValueError` for what is no JSON: "line 3 is not `what` (why)".
    """
    for number, line in enumerate(split_lines(text), start=1):
        if not line.strip(_JSON_SPACE):
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not {what} ({error.msg}, column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, too deep
            raise ValueError(f"line {number} is not {what} ({error})") from error


def escape_json_lines(content: bytes) -> bytes:
    """JSON in UTF-8 of the same meaning, which is one line for every reader. Costs next to nothing for ASCII.

    Outside strings JSON has none of these characters, so they can be replaced without looking where they stand.
    """
    if content.isascii():
        return content
    # Looking for the first byte alone is what makes it cheap for texts without one.
    if b"\xc2" in content:
        content = content.replace(b"\xc2\x85", b"\\u0085")
    if b"\xe2" in content:
        content = content.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return content
