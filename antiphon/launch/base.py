"""The interface of a launcher, and the part of it that a rank uses in its own process."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from antiphon.core.lines import split_lines

_GRACE_S = 1.0
"""How long the other ranks may continue after the first failure, so that their tracebacks appear too."""

_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place of one rank in its group, and the addresses of the group and of the launching process.

    folder: private to the group; all ranks and the launching process can access it at this path. front: ZeroMQ address
    on which the launching process listens. meeting: the `init_method` by which the ranks connect their `RankGroup`.
    """

    rank: int
    size: int
    folder: Path
    front: str
    meeting: str

    def arguments(self) -> list[str]:
        """The command-line arguments that `from_arguments` parses."""
        words = ["--rank", str(self.rank), "--size", str(self.size), "--folder", str(self.folder)]
        return [*words, "--front", self.front, "--meeting", self.meeting]

    @classmethod
    def from_arguments(cls) -> Self:
        """The place of this process, from the command line that its launcher made."""
        parser = argparse.ArgumentParser(description="One rank. Started by a launcher, never by hand.")
        parser.add_argument("--rank", type=int, required=True)
        parser.add_argument("--size", type=int, required=True)
        parser.add_argument("--folder", type=Path, required=True)
        parser.add_argument("--front", required=True)
        parser.add_argument("--meeting", required=True)
        return cls(**vars(parser.parse_args()))


def end_with_launcher(folder: Path) -> None:
    """Watch the launching process; when it is gone, remove the folder and end this process immediately.

    A launcher keeps the standard input of its ranks open; the system closes it when the launching process ends.
    """

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock would interfere with interpreter shutdown
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


class Launcher(ABC):
    """Starts ranks, one process each."""

    @abstractmethod
    def prepare(self, size: int, *, prefix: str = "antiphon-") -> RankProcesses:
        """Prepare the addresses and the private folder of `size` ranks without starting them. prefix: of its name."""


class RankProcesses(ABC):
    """The processes of one group of ranks. `close`, or the end of the `with` block, ends them and removes the folder.

    folder, front and meeting are those of `Place`. They exist before the ranks start, so that the launching process can
    listen and write files.
    """

    def __init__(self, *, size: int, folder: Path, front: str, meeting: str) -> None:
        self.size = size
        self.folder = folder
        self.front = front
        self.meeting = meeting

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def place(self, rank: int) -> Place:
        """The place of rank `rank`."""
        return Place(rank=rank, size=self.size, folder=self.folder, front=self.front, meeting=self.meeting)

    # ---- what a launcher implements

    @abstractmethod
    def start(
        self, module: str, environment: Mapping[str, str] | None = None, *, show_stderr_of_rank_0: bool = False
    ) -> None:
        """Run `python -m module` for every rank, with its place as arguments.

        environment: added to that of the launching process. show_stderr_of_rank_0: it appears on this process's own
        stderr instead of in `output(0)`, to show progress.
        """

    @abstractmethod
    def exit_code(self, rank: int) -> int | None:
        """The exit code of a rank, minus the signal's number if one killed it; `None` while it runs."""

    @abstractmethod
    def name(self, rank: int) -> str:
        """The name of a rank and its process, for messages: "rank 1 (pid 4711)"."""

    @abstractmethod
    def output(self, rank: int) -> str:
        """The output of a rank so far; "" if it is lost."""

    @abstractmethod
    def end(self, *, patience_s: float = 0.0) -> None:
        """Wait up to `patience_s` for the ranks to end on their own, then kill them and their child processes."""

    def close(self, *, patience_s: float = 0.0) -> None:
        """Call `end` and remove the folder. May be called more than once."""
        try:
            self.end(patience_s=patience_s)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what follows from it

    def ended(self, rank: int) -> bool:
        return self.exit_code(rank) is not None

    def killed(self, rank: int) -> bool:
        """Whether a signal ended the rank."""
        code = self.exit_code(rank)
        return code is not None and code < 0

    def any_ended(self) -> bool:
        return any(self.ended(rank) for rank in range(self.size))

    def wait(self, limit_s: float) -> str | None:
        """Wait until all ranks have ended. Returns `None` if all succeeded, else a description of the failure.

        After the first failure the others get a short time to fail too. Late ranks are still running on return.
        """
        deadline = time.monotonic() + limit_s
        failure: str | None = None
        while True:
            codes = [self.exit_code(rank) for rank in range(self.size)]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed and failure is None:
                failure = f"rank {failed[0]} failed first, {_how(codes[failed[0]] or 0)}"
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            late = [rank for rank, code in enumerate(codes) if code is None]
            if not late:
                return failure
            if time.monotonic() > deadline:
                return failure or f"ranks {late} did not end within {limit_s:g} s"
            time.sleep(_POLL_S)

    def obituary(self, rank: int, what: str) -> str:
        """How an ended rank ended, and its last line of output. what: the work it was doing, such as "generate"."""
        code = self.exit_code(rank)
        assert code is not None, f"rank {rank} is running"
        if code >= 0:
            return f"{self.name(rank)} ended with code {code} during {what}{self._last_words(rank)}"
        name = signal.Signals(-code).name
        cause = " (lack of memory is a usual cause)" if name == "SIGKILL" else self._last_words(rank)
        return f"{self.name(rank)} was killed by {name} during {what}{cause}"

    def _last_words(self, rank: int) -> str:
        lines = [line for line in split_lines(self.output(rank)) if line.strip() and " INFO " not in line]
        return f"; its last words: {lines[-1].strip()}" if lines else ""


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
