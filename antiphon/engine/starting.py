"""What a rank says while it starts, and what the front makes of it for the user."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

LOADING = "loading the model"


class Starting(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What this rank does now; while it loads, how much of what it needs it has read."""

    what: str
    bytes_read: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        if not self.num_bytes:
            return self.what
        size = f"{self.num_bytes / 1e9:.1f} GB" if self.num_bytes >= 1e9 else f"{self.num_bytes / 1e6:.1f} MB"
        return f"{self.what}: {self.bytes_read / self.num_bytes:.0%} of {size}"


class Throttle:
    """Passes on the first and the last word of everything that a rank does, and one every `interval_s` between."""

    def __init__(self, send: Callable[[Starting], None], *, interval_s: float = 0.2) -> None:
        self._send = send
        self._interval_s = interval_s
        self._last: tuple[str, float] = ("", 0.0)

    def __call__(self, starting: Starting) -> None:
        what, sent_s = self._last
        now_s = time.monotonic()
        complete = 0 < starting.num_bytes == starting.bytes_read
        if starting.what != what or complete or now_s - sent_s >= self._interval_s:
            self._last = (starting.what, now_s)
            self._send(starting)


def describe_start(by_rank: Mapping[int, Starting], rank: int) -> str:
    """One line after `rank` has spoken: the bytes of all ranks that still load, or else what this one does."""
    loading = [said for said in by_rank.values() if said.num_bytes]
    if loading:
        done, total = sum(said.bytes_read for said in loading), sum(said.num_bytes for said in loading)
        return str(Starting(what=LOADING, bytes_read=done, num_bytes=total))
    return str(by_rank[rank])
