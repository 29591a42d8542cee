"""Turns cut positions into slices of tokens and requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from antiphon.core.errors import OptionError


@dataclass(frozen=True, slots=True)
class MicroSlice:
    """One part of a batch: its tokens, and the requests that have a token in it."""

    token_slice: slice
    request_slice: slice


def token_slices(query_lens: Sequence[int], cuts: Sequence[int]) -> list[MicroSlice]:
    """The parts of a batch that is cut before each of the tokens `cuts`.

    query_lens: tokens of each request, each at least 1. cuts: strictly increasing, inside (0, number of tokens).
    A request that straddles a cut is in the `request_slice` of both parts.
    Raises `OptionError` (a `ValueError`) for cuts that would make an empty part.

        token_slices([8, 8], [12])  # tokens 0:12 of requests 0:2, tokens 12:16 of requests 1:2
    """
    ends, total = [], 0
    for index, length in enumerate(query_lens):
        if length < 1:
            raise OptionError(
                f"query_lens[{index}]={length} is less than 1",
                remedy="leave out requests without tokens",
                option=f"query_lens[{index}]",
                value=length,
            )
        total += length
        ends.append(total)
    edges = [0, *cuts, total]
    if any(stop <= start for start, stop in pairwise(edges)):
        raise OptionError(
            f"cuts={list(cuts)} would make an empty part of {total} tokens",
            remedy=f"use strictly increasing positions, above 0 and below {total}",
            option="cuts",
            value=list(cuts),
        )
    parts = []
    for start, stop in pairwise(edges):
        first = next(index for index, end in enumerate(ends) if end > start)
        last = next(index for index, end in enumerate(ends) if end >= stop)
        parts.append(MicroSlice(slice(start, stop), slice(first, last + 1)))
    return parts
