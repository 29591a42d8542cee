"""One rank in a process of its own: `python -m antiphon.engine.worker --rank R ...`.

It is started by a launcher, never by hand. The folder of the ranks holds `options.json` and the progress board. The
worker exits when the frontend tells it to, when the frontend has died, or after an error, which it reports first.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
import zmq

from antiphon.comm import ProgressBoard, RankGroup
from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.core.errors import AntiphonError
from antiphon.engine.build import build_engine, ready_message
from antiphon.engine.messages import (
    AllLoaded,
    Answer,
    Ask,
    Failed,
    FromWorker,
    Loaded,
    Reconfigure,
    Starting,
    Stop,
    Throttle,
    Tokens,
    ToWorker,
    Warned,
    Work,
    decode_to_worker,
    encode,
    keep_all,
)
from antiphon.engine.step import StepEngine
from antiphon.launch import Place, end_with_launcher
from antiphon.models import MatchedFiles

logger = logging.getLogger("antiphon.engine.worker")

OPTIONS_FILE = "options.json"
PROGRESS_FILE = "progress"

START_S = 120.0
"""Ranks may take this long to load and to connect, even if `timeout_s` is shorter."""

_LINGER_MS = 2000
_SIGN_S = 1.0


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What the frontend passes to its workers at the start: the options, and what only the frontend finds out."""

    options: EngineConfig
    eos_token_ids: tuple[int, ...]  # with the tokenizer's, which only the frontend loads
    matched: MatchedFiles | None  # only the frontend matches the checkpoint with the model; None with dummy weights

    @classmethod
    def of(cls, config: ResolvedConfig) -> WorkerStart:
        """Collect it from the frontend's configuration."""
        return cls(options=config.options, eos_token_ids=config.model.eos_token_ids, matched=config.matched)

    def resolve(self) -> ResolvedConfig:
        """Resolve the frontend's configuration again, without reading weights. Raises like `EngineConfig.resolve`."""
        return self.options.resolve(matched=self.matched).with_end_tokens(self.eos_token_ids)


class KeptWarnings(logging.Handler):
    """Keeps warnings until they are sent to the frontend, because nobody reads the log of a healthy worker.

    Errors are left out: `Failed` reports them.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[Warned] = deque()  # thread-safe, as any thread may log

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self._kept.append(Warned(logger=record.name, text=record.getMessage()))

    def take(self) -> list[Warned]:
        """Return the warnings since the last call."""
        return [self._kept.popleft() for _ in range(len(self._kept))]


class Worker:
    """The loop of one rank: take messages, step, send tokens.

    sign_s: after this long without a token, such as in a long prompt, the worker tells the frontend that steps go on.
    warnings: the warnings of this process, to send to the frontend.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        engine: StepEngine,
        *,
        sign_s: float = _SIGN_S,
        warnings: KeptWarnings | None = None,
    ) -> None:
        self._socket = socket
        self._engine = engine
        self._sign_s = sign_s
        self._warnings = warnings or KeptWarnings()
        self._stopped = False

    def run(self) -> None:
        """Run until all ranks have seen `Stop`. Blocks on the socket while no rank has work."""
        idle = True
        sent_at = time.monotonic()
        while not (idle and self._stopped):
            self._take_messages(block=idle)
            result = self._engine.step()
            idle = result.plan.idle
            _send_all(self._socket, self._warnings.take())
            now = time.monotonic()
            if result.outputs or (not idle and now > sent_at + self._sign_s):
                _send(self._socket, Tokens(outputs=result.outputs))
                sent_at = now

    def _take_messages(self, *, block: bool) -> None:
        while block or self._socket.poll(0):
            block = False
            self._handle(decode_to_worker(self._socket.recv()))

    def _handle(self, message: ToWorker) -> None:
        self._engine.wave = message.wave
        match message:
            case Work():
                self._engine.scheduler.abort(message.abort)
                self._engine.scheduler.add(message.requests)
            case Reconfigure():
                self._engine.reconfigure(message.policy)
                _send(self._socket, Answer(wave=message.wave))
            case Ask():
                _send(self._socket, self._answer(message))
            case AllLoaded():
                raise AssertionError("AllLoaded comes before the engine is made")
            case Stop():
                self._engine.scheduler.abort(list(self._engine.scheduler.requests))
                self._stopped = True

    def _answer(self, ask: Ask) -> Answer:
        if ask.timeline:
            return Answer(wave=ask.wave, timeline=list(self._engine.recorder.steps))
        return Answer(wave=ask.wave, stats=self._engine.statistics())


def main() -> int:
    """Run the worker. Returns the exit code: 0 after `Stop`, 1 after an error."""
    place = Place.from_arguments()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {place.rank} %(levelname)s %(name)s: %(message)s")
    end_with_launcher(place.folder)
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, str(place.rank).encode())
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    keep_all(socket)
    socket.connect(place.front)
    try:
        _serve(socket, place)
    except Exception as error:
        logger.exception("rank %d failed", place.rank)
        _send(socket, _failed(error))
        exit_code = 1
    else:
        exit_code = 0
    socket.close()
    socket.context.term()  # waits, 2 s at most, until the last message has been sent
    return exit_code


def _serve(socket: zmq.Socket[bytes], place: Place) -> None:
    rank, folder = place.rank, place.folder
    start = msgspec.json.decode((folder / OPTIONS_FILE).read_bytes(), type=WorkerStart)
    options, config = start.options, start.resolve()
    warnings = KeptWarnings()
    # Only now, because the frontend has logged the warnings of resolving the same options.
    logging.getLogger("antiphon").addHandler(warnings)
    torch.set_num_threads(_threads_per_rank(options.ranks))
    board = ProgressBoard(folder / PROGRESS_FILE, size=options.ranks)
    group = RankGroup.connect(
        rank=rank,
        size=options.ranks,
        init_method=place.meeting,
        timeout_s=options.timeout_s,
        meeting_timeout_s=max(options.timeout_s, START_S),
        board=board,
        on_stuck=partial(report_and_exit, rank=rank, folder=folder),
    )
    send = Throttle(partial(_send, socket))

    def report(starting: Starting) -> None:
        board.mark(rank, str(starting))
        send(starting)

    engine = build_engine(config, group, report=report, meet=partial(_wait_for_all, socket))
    board.mark(rank, "ready")
    _send_all(socket, [*warnings.take(), ready_message(engine)])
    Worker(socket, engine, sign_s=min(_SIGN_S, options.timeout_s / 4), warnings=warnings).run()
    group.close()


def _wait_for_all(socket: zmq.Socket[bytes]) -> None:
    """Wait until every rank has its weights. There is no time limit, because the frontend watches the ranks."""
    _send(socket, Loaded())
    message = decode_to_worker(socket.recv())
    assert isinstance(message, AllLoaded)


def report_and_exit(message: str, *, rank: int, folder: Path, kind: str = "PeerError") -> NoReturn:
    """Write a report for the frontend and exit at once. Any thread may call it, whatever the others wait for.

    The device watch calls it. It does not touch the socket, which belongs to another thread, and makes no call that
    could wait for a device.
    """
    failed = Failed(kind=kind, message=message, traceback="")
    unfinished = _report_file(rank, folder).with_suffix(f".{threading.get_native_id()}")
    unfinished.write_bytes(msgspec.json.encode(failed))
    unfinished.rename(_report_file(rank, folder))  # atomic, so the frontend never reads half of it
    os._exit(1)


def read_report(rank: int, folder: Path) -> Failed | None:
    """Return the report that `report_and_exit` has written; `None` if there is none."""
    path = _report_file(rank, folder)
    return msgspec.json.decode(path.read_bytes(), type=Failed) if path.exists() else None


def _report_file(rank: int, folder: Path) -> Path:
    return folder / f"failed-rank{rank}.json"


def _failed(error: Exception) -> Failed:
    kind, trace = type(error).__name__, traceback.format_exc()
    if isinstance(error, AntiphonError):
        return Failed(kind=kind, message=str(error), traceback=trace, fields=error.fields())
    return Failed(kind=kind, message=f"{kind}: {error}", traceback=trace)


def _threads_per_rank(ranks: int) -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // ranks)


def _send(socket: zmq.Socket[bytes], message: FromWorker) -> None:
    socket.send(encode(message))


def _send_all(socket: zmq.Socket[bytes], messages: Iterable[FromWorker]) -> None:
    for message in messages:
        _send(socket, message)


if __name__ == "__main__":
    exit_code = main()
    logging.shutdown()
    os._exit(exit_code)  # skips unloading torch, which takes a second
