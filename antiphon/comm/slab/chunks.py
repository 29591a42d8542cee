"""How a slab is cut into chunks that travel one behind the other; the same on both sides of a link."""

from __future__ import annotations

from typing import NamedTuple

MAX_CHUNKS = 8
_SMALLEST_CHUNK = 1 << 20
_ALIGNMENT = 4096


class Chunk(NamedTuple):
    """Bytes `start` to `start + num_bytes` of a slab."""

    start: int
    num_bytes: int


def chunks_of(num_bytes: int) -> list[Chunk]:
    """At most 8 chunks; one, which may be empty, if there are less than 2 MiB."""
    count = max(1, min(MAX_CHUNKS, num_bytes // _SMALLEST_CHUNK))
    size = -(-num_bytes // count // _ALIGNMENT) * _ALIGNMENT or 1
    starts = range(0, num_bytes, size) if num_bytes else (0,)
    return [Chunk(start, min(size, num_bytes - start)) for start in starts]
