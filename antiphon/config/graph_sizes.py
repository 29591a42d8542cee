"""The sizes of padded steps: the ladder of a lane, from the options and the device."""

from __future__ import annotations

from collections.abc import Iterator

from antiphon.core.errors import OptionError

LARGEST_SIZE = 512
"""Rows of a lane beyond which steps are eager by default: a step then takes longer than its launches."""

_STRETCHES = ((8, 64), (16, 256), (32, LARGEST_SIZE))  # step, up to


def default_ladder() -> Iterator[int]:
    """1, 2, 4, 8, and then steps that pad by at most an eighth or so, without end at the top."""
    yield from (1, 2, 4, 8)
    size = 8
    for stride, end in _STRETCHES:
        while size < end:
            size += stride
            yield size


def parse_graph_sizes(text: str) -> tuple[int, ...]:
    """Sizes written as "1,2,4,8", ascending and distinct. Raises `OptionError` for anything else."""
    try:
        sizes = tuple(sorted({int(word) for word in text.replace(",", " ").split()}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise OptionError(
            f"cuda_graph_sizes={text!r} is not a list of sizes",
            remedy="write it like 1,2,4,8,16",
            option="cuda_graph_sizes",
            value=text,
        )
    return sizes


def ladder_up_to(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The sizes that steps of up to `most` rows need: those below it, and the first that holds it."""
    enough = next((size for size in sizes if size >= most), sizes[-1] if sizes else 0)
    return tuple(size for size in sizes if size <= enough)
