"""A watchdog for waits that a GPU stream cannot abandon.

`cuStreamWaitValue32` and the kernels of collectives have no timeout. So each stream writes a code to a word of pinned
host memory before it waits, and 0 afterwards. A thread that makes no driver calls polls the words and records on the
progress board what this rank waits for. If a code stays longer than the time limit, the thread reports which rank is
missing and ends the process.

An eager wait has a code of its own. In a captured step codes are constants: a thread that looks now and then may find
the same one in every replay, although nothing is stuck. So each replay is preceded by a new number, its epoch, in one
more word, and a wait is stuck if neither its code nor the epoch changes. A step contains each label once, so the same
code in the same epoch is the same wait.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from antiphon.comm.progress import ProgressBoard
from antiphon.device.cuda_stream_memory import StreamOperations

logger = logging.getLogger("antiphon.comm")

_MAX_WORDS = 64
_LABELS = 4096
_EAGER_NUMBERS = 2**24
_CAPTURED_LABELS = 2**14  # 96 layers, 2 phases and 8 lanes need 1,536
_OTHER_LABEL = "an exchange of a captured step"
_PEERS = 64
ALL_PEERS = _PEERS - 1
"""In place of a peer's rank: the wait is for all peers."""

_PERIOD_S = 0.2


@dataclass(slots=True, eq=False)
class WatchWord:
    """The word of one stream. Its value is `code(label) + peer` while the stream waits, otherwise 0.

    A code is a number times 64: 1 to 2**24 for eager waits, in turn, and above that one for each label of captured
    steps, which never changes because graphs hold it.
    """

    address: int
    _labels: list[str] = field(default_factory=lambda: [""] * _LABELS)
    _number: int = 0
    _captured: dict[str, int] = field(default_factory=dict)  # numbers by label
    _captured_labels: list[str] = field(default_factory=lambda: [_OTHER_LABEL])

    def code(self, label: str, *, captured: bool = False) -> int:
        """Return the code for a new wait; the caller adds the rank of the peer, or `ALL_PEERS`.

        captured: the wait is being captured, so the code is the same for all waits with this label.
        """
        if captured:
            return self._captured_number(label) * _PEERS
        self._number = self._number % _EAGER_NUMBERS + 1
        self._labels[self._number % _LABELS] = label
        return self._number * _PEERS

    def explain(self, value: int) -> tuple[str, str]:
        """Decode a value into its label and the peers that the stream waits for."""
        number, peer = divmod(value, _PEERS)
        if number > _EAGER_NUMBERS:
            label = self._captured_labels[number - _EAGER_NUMBERS - 1]
        else:
            label = self._labels[number % _LABELS]
        return label, "its peers" if peer == ALL_PEERS else f"rank {peer}"

    def _captured_number(self, label: str) -> int:
        number = self._captured.get(label)
        if number is None:
            if len(self._captured) == _CAPTURED_LABELS:
                return _EAGER_NUMBERS + 1  # graphs hold all other numbers
            self._captured_labels.append(label)
            number = self._captured[label] = _EAGER_NUMBERS + len(self._captured_labels)
        return number


class DeviceWatch:
    """Watches the words of one rank.

    on_stuck: called with the report, on the watch's own thread, before the process ends.
    """

    def __init__(
        self,
        *,
        rank: int,
        timeout_s: float,
        board: ProgressBoard | None = None,
        on_stuck: Callable[[str], None] | None = None,
        pin_memory: bool = True,
    ) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._board = board
        self._on_stuck = on_stuck
        with torch.inference_mode(False):
            self._memory = torch.zeros(_MAX_WORDS + 1, dtype=torch.int32, device="cpu", pin_memory=pin_memory)
        self._values = self._memory.numpy()[:_MAX_WORDS]
        self._epoch = self._memory.numpy()[_MAX_WORDS:]
        self._num_epochs = 0
        self._write_epoch: StreamOperations | None = None
        self._words: dict[str, WatchWord] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def word(self, stream: str) -> WatchWord:
        """Return the word of a stream. The first call starts the thread."""
        if stream in self._words:
            return self._words[stream]
        assert len(self._words) < _MAX_WORDS, f"at most {_MAX_WORDS} streams can be watched"
        word = self._words[stream] = WatchWord(self._memory.data_ptr() + 4 * len(self._words))
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="device-watch", daemon=True)
            self._thread.start()
        return word

    def next_epoch(self, stream: int) -> None:
        """Queue a new epoch on the stream that is about to replay a captured step. stream: its raw handle."""
        if self._write_epoch is None:
            self._write_epoch = StreamOperations(flush=False)
            self._write_epoch.write(int(self._epoch.ctypes.data), 0)
        self._num_epochs = self._num_epochs % (2**31 - 1) + 1
        self._write_epoch.set_value(0, self._num_epochs)
        self._write_epoch.queue(stream)

    def close(self) -> None:
        """Stop the thread once no stream waits. Work abandoned at shutdown may still wait for a peer."""
        self._closed.set()

    def _watch(self) -> None:
        since: dict[int, tuple[tuple[int, int], float]] = {}  # by place: code and epoch, and when they were first seen
        reported: set[int] = set()
        while True:
            if self._closed.wait(_PERIOD_S):
                if not self._values.any():
                    return
                time.sleep(_PERIOD_S)
            now = time.monotonic()
            epoch = int(self._epoch[0])
            for place, word in enumerate(list(self._words.values())):
                value = int(self._values[place])
                if value == 0:
                    if since.pop(place, None) is not None and place in reported:
                        reported.discard(place)
                        self._mark("computing")
                elif place not in since or since[place][0] != (value, epoch):
                    since[place] = ((value, epoch), now)
                    reported.discard(place)
                elif now - since[place][1] > self._timeout_s:
                    self._report(word, value, now - since[place][1])
                    return
                elif place not in reported and now - since[place][1] > 2 * _PERIOD_S:
                    reported.add(place)  # once per wait, so that the board shows when it began
                    label, peers = word.explain(value)
                    self._mark(f"waiting on its device for {label} from {peers}")

    def _mark(self, where: str) -> None:
        if self._board is not None:
            self._board.mark(self._rank, where)

    def _report(self, word: WatchWord, value: int, waited_s: float) -> None:
        label, peers = word.explain(value)
        message = f"rank {self._rank} timed out after {waited_s:.1f} s waiting on its device for {label} from {peers}"
        try:
            if self._board is not None:
                message += f": {self._board.describe(except_rank=self._rank)}"
            if self._on_stuck is not None:
                self._on_stuck(message)
        finally:
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(1)
