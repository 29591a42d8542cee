"""Requests that decode, in groups that bound the memory of plain-torch attention over gathered blocks."""

from __future__ import annotations

MOST_POSITIONS = 1 << 18
"""Requests by the longest of their texts, as gathered at once: half a GiB for keys and values of 1,024 bfloat16."""


def request_groups(num_requests: int, length: int, most_positions: int) -> list[slice]:
    """Slices of the requests, each of at most `most_positions` padded positions, but of one request at least."""
    step = max(1, most_positions // max(1, length))
    return [slice(start, min(start + step, num_requests)) for start in range(0, num_requests, step)]
