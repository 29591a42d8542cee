"""The progress board: what every rank of one host is doing, so that an error can name the missing rank.

It is a file that all ranks of the host map, with one fixed-size row of text per rank. A rank writes its row before it
waits for its peers. Nothing synchronizes on the board; at worst a torn row garbles an error message.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

_ROW_BYTES = 256


class ProgressBoard:
    """The board in the file `path`, for `size` ranks. The first process to open it creates the file."""

    def __init__(self, path: Path, *, size: int) -> None:
        self.size = size
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, size * _ROW_BYTES)
            self._map = mmap.mmap(descriptor, size * _ROW_BYTES)
        finally:
            os.close(descriptor)

    def mark(self, rank: int, where: str) -> None:
        """Record what `rank`, the calling process, is doing, such as "waiting for combine layer 3, lane 1"."""
        row = f"{os.getpid()} {time.monotonic():.3f} {where}".encode()[:_ROW_BYTES]
        self._map[rank * _ROW_BYTES : (rank + 1) * _ROW_BYTES] = row.ljust(_ROW_BYTES, b"\0")

    def describe(self, *, except_rank: int | None = None) -> str:
        """One clause per rank: its process, the state of that process, and what it did last."""
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
