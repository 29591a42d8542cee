"""The progress board: where every rank of one host is, so that an error can say who is missing.

A file mapped by all ranks of the host, one fixed row of text a rank. A rank writes its row before it waits for its
peers; nobody waits for the board itself, and a torn row would only blur an error message.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

_ROW_BYTES = 256


class ProgressBoard:
    """The board in `path` for `size` ranks. Whoever opens it first creates it."""

    def __init__(self, path: Path, *, size: int) -> None:
        self.size = size
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, size * _ROW_BYTES)
            self._map = mmap.mmap(descriptor, size * _ROW_BYTES)
        finally:
            os.close(descriptor)

    def mark(self, rank: int, where: str) -> None:
        """Say where `rank`, the calling process, is: "waiting for combine layer 3, lane 1"."""
        row = f"{os.getpid()} {time.monotonic():.3f} {where}".encode()[:_ROW_BYTES]
        self._map[rank * _ROW_BYTES : (rank + 1) * _ROW_BYTES] = row.ljust(_ROW_BYTES, b"\0")

    def describe(self, *, except_rank: int | None = None) -> str:
        """One clause a rank: its process, whether it runs, and where it was last."""
        return "; ".join(self._describe(rank) for rank in range(self.size) if rank != except_rank)

    def _describe(self, rank: int) -> str:
        row = self._map[rank * _ROW_BYTES : (rank + 1) * _ROW_BYTES].rstrip(b"\0").decode(errors="replace")
        if not row:
            return f"rank {rank} never started"
        pid, since, where = row.split(" ", 2)
        age_s = time.monotonic() - float(since)
        return f"rank {rank} (pid {pid}, {_process_state(int(pid))}) was last {where}, {age_s:.1f} s ago"


def _process_state(pid: int) -> str:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "ended" if Path("/proc/self/stat").exists() else "state unknown"
    except (OSError, IndexError):
        return "state unknown"
    return {"T": "stopped", "t": "stopped", "Z": "ended", "X": "ended"}.get(letter, "running")
