"""The sizes of padded steps, from the options and the device, and what became of them on the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from antiphon.core.errors import OptionError

LARGEST_SIZE = 512
"""Rows of a lane beyond which steps are eager by default: a step then takes longer than its launches."""

_STRETCHES = ((8, 64), (16, 256))  # step, up to
_LAST_STEP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureReport:
    """What a rank captured. sizes: ascending sizes of padded steps, by number of lanes, captured or not.

    obstacle: why nothing is captured; "" if something is. num_bytes: of device memory that the graphs take.
    measured: what both plans of decode steps were found to be good for, in words; "" if they were not measured.
    """

    num_graphs: int = 0
    time_s: float = 0.0
    num_bytes: int = 0
    sizes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    obstacle: str = ""
    measured: str = ""


def default_ladder(largest: int = LARGEST_SIZE) -> Iterator[int]:
    """1, 2, 4, 8, then steps of 8 to 64, of 16 to 256 and of 32 to `largest`, which is the last one."""
    yield from takewhile(lambda size: size < largest, _endless_ladder())
    yield largest


def _endless_ladder() -> Iterator[int]:
    yield from (1, 2, 4, 8)
    size = 8
    for step, end in _STRETCHES:
        while size < end:
            size += step
            yield size
    while True:
        size += _LAST_STEP
        yield size


def parse_graph_sizes(text: str) -> tuple[int, ...]:
    """The sizes that a text means, ascending and distinct.

    Several numbers are the sizes themselves, as in "1,2,4,8". A single one, "64", is the largest size of the default
    ladder, as in vLLM, and "64," is that size alone. Raises `OptionError` for anything else.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdecimal() and int(word) > 0 for word in words):
        raise OptionError(
            f"cuda_graph_sizes={text!r} is not a list of sizes",
            limit="a size is a number of sequences, at least 1",
            remedy="write it like 1,2,4,8, or the largest size alone, like 64",
            option="cuda_graph_sizes",
            value=text,
        )
    sizes = tuple(sorted({int(word) for word in words}))
    return sizes if len(words) > 1 or "," in text else tuple(default_ladder(sizes[0]))


def only_sizes(text: Any) -> Any:
    """The text for exactly the sizes in `text`, even if it is one. What is no text is not changed."""
    return f"{text}," if isinstance(text, str) and "," not in text else text


def ladder_up_to(sizes: tuple[int, ...], most: int, *, limit: int) -> tuple[int, ...]:
    """The sizes that steps of up to `most` rows need, none above `limit` rows.

    A size above what holds `most` becomes the first default size that does. Lanes may be uneven, so it is not `most`.
    """
    enough = min(limit, next(size for size in _endless_ladder() if size >= most))
    return tuple(sorted({min(size, enough) for size in sizes}))
