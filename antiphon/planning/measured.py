"""Serial or split decode steps, as measured on this machine when the engine starts.

Captured steps are replayed with as many sequences as each size holds, serial and split in turn, and every rank learns
the slowest rank's times. A step takes the plan that was faster at the next measured size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSize:
    """Milliseconds of a step with this many sequences on every rank, the same on all ranks."""

    num_sequences: int
    serial_ms: float
    split_ms: float

    @property
    def splits(self) -> bool:
        return self.split_ms < self.serial_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDecode:
    """The measured sizes, ascending. most_serial: the most sequences of a serial step that is captured."""

    sizes: tuple[MeasuredSize, ...]
    most_serial: int = 0  # 0: any number

    def splits(self, num_sequences: int) -> bool:
        """Whether to split a step. One that is captured only if it is split is: an eager step takes far longer."""
        return 0 < self.most_serial < num_sequences or self.nearest(num_sequences).splits

    def nearest(self, num_sequences: int) -> MeasuredSize:
        """The smallest measured size that fits this many sequences, else the largest."""
        return next((size for size in self.sizes if size.num_sequences >= num_sequences), self.sizes[-1])

    def describe(self) -> str:
        """Which sizes are split, in words."""
        split = [size.num_sequences for size in self.sizes if size.splits]
        if not split:
            return "serial at every size"
        if len(split) == len(self.sizes):
            return "split at every size"
        if split == [size.num_sequences for size in self.sizes if size.num_sequences >= split[0]]:
            return f"split from {split[0]} sequences"
        return f"split at {', '.join(map(str, split))} sequences"


def combine(by_rank: Sequence[Sequence[tuple[int, float, float]]], *, most_serial: int = 0) -> MeasuredDecode | None:
    """From every rank's (sequences, serial ms, split ms), in the same order; `None` if there are none."""
    sizes = tuple(
        MeasuredSize(
            num_sequences=rows[0][0], serial_ms=max(row[1] for row in rows), split_ms=max(row[2] for row in rows)
        )
        for rows in zip(*by_rank, strict=True)
    )
    return MeasuredDecode(sizes=sizes, most_serial=most_serial) if sizes else None
