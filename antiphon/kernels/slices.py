"""How slabs are cut into slices where a kernel carries them through host memory: the same way on both ends."""

from __future__ import annotations

ALIGNMENT = 16
"""Slabs, slices and their places are multiples of this, in bytes: what a thread copies at once."""

LARGEST_SLICE = 8192
"""In bytes: what a program of 128 threads holds as four accesses of 16 bytes for each thread."""

MAX_SLICES = 1024
"""The most slices of a slab. Flags and epochs are laid out for so many."""

LARGEST_SLAB = MAX_SLICES * LARGEST_SLICE
"""In bytes."""

_SMALLEST_SLICE = 2048  # one access for each thread; less is not worth a flag


def slice_bytes(num_bytes: int, num_peers: int, num_programs: int) -> int:
    """The size of a slice of a slab: small enough for all programs to have one of some peer, within limits."""
    share = -(-num_bytes * num_peers // (num_programs * ALIGNMENT)) * ALIGNMENT
    return min(max(share, _SMALLEST_SLICE), LARGEST_SLICE)
