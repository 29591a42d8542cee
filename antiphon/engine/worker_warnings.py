"""Warnings of the ranks on their way to the user, who never sees the log file of a worker while all is well."""

from __future__ import annotations

import logging
from collections import deque

from antiphon.engine.messages import Warned


class KeptWarnings(logging.Handler):
    """In a worker: what was logged as a warning, until it is sent. Errors are left out: `Failed` brings them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[Warned] = deque()  # loggers may be used by any thread

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self._kept.append(Warned(logger=record.name, text=record.getMessage()))

    def take(self) -> list[Warned]:
        """What has come since the last call."""
        return [self._kept.popleft() for _ in range(len(self._kept))]


class SaidOnce:
    """In the front: logs each warning of the ranks once, however many of them have it."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, warned: Warned) -> None:
        if warned.text not in self._said:
            self._said.add(warned.text)
            logging.getLogger(warned.logger).warning("%s", warned.text)
