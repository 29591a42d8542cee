"""Talks to the workers, one process per rank, and turns the failure of any of them into one clear error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from antiphon.comm import ProgressBoard
from antiphon.comm.needs import peer_environment
from antiphon.config.engine_config import ResolvedConfig
from antiphon.core.errors import AntiphonError, EngineError, ModelError, OptionError
from antiphon.core.policy import OverlapPolicy
from antiphon.engine.messages import (
    AllLoaded,
    Answer,
    Ask,
    Failed,
    FromWorker,
    Loaded,
    Ready,
    Reconfigure,
    Starting,
    Stop,
    Tokens,
    ToWorker,
    Warned,
    Work,
    decode_from_worker,
    describe_start,
    encode,
    keep_all,
)
from antiphon.engine.scheduling.request import Request, TokenOutput
from antiphon.engine.worker import OPTIONS_FILE, PROGRESS_FILE, START_S, WorkerStart, read_report
from antiphon.launch import Launcher, LocalLauncher
from antiphon.timeline import StepTimeline

_POLL_MS = 100
_CAUSE_S = 2.0  # how long to wait for the reports of the other ranks before naming the cause of a failure
_STOP_S = 5.0


class RankWarnings:
    """Logs each warning once, however many ranks send it."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def log(self, warned: Warned) -> None:
        if warned.text not in self._logged:
            self._logged.add(warned.text)
            logging.getLogger(warned.logger).warning("%s", warned.text)


class WorkerClient:
    """Owns the worker processes and the socket to them.

    The folder of the ranks holds their options, reports and progress board, besides what the launcher needs.
    """

    ready: Ready

    def __init__(
        self,
        config: ResolvedConfig,
        on_start: Callable[[str], None] | None = None,
        *,
        launcher: Launcher | None = None,
    ) -> None:
        """Start the ranks, and return when all are ready. on_start: called at every stage until then.

        launcher: starts the processes; `None` starts them on this host.
        """
        self._ranks = config.options.ranks
        self._patience_s = config.options.timeout_s * 1.5
        self._wave = 0
        self._heard_at = time.monotonic()
        self._ended = ""
        self._failures: dict[int, Failed] = {}
        self._kept: list[TokenOutput] = []
        self._warnings = RankWarnings()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        keep_all(self._socket)
        try:
            self._processes = (launcher or LocalLauncher()).prepare(self._ranks)
        except BaseException:
            self._context.destroy()
            raise
        try:
            folder = self._processes.folder
            self._board = ProgressBoard(folder / PROGRESS_FILE, size=self._ranks)
            (folder / OPTIONS_FILE).write_bytes(msgspec.json.encode(WorkerStart.of(config)))
            self._socket.bind(self._processes.front)
            self._processes.start("antiphon.engine.worker", peer_environment(peer_access=config.options.peer_access))
            self._wait_for_ready(on_start or (lambda what: None))
        except BaseException:
            self._ended = self._ended or "it did not start"  # so that `close` does not wait
            self.close()
            raise

    def _wait_for_ready(self, on_start: Callable[[str], None]) -> None:
        """Wait for all ranks. Every message restarts the time limit, so it does not depend on the model's size."""
        on_start(f"starting {self._ranks} ranks")
        said: dict[int, Starting] = {}
        loaded: set[int] = set()
        ready: set[int] = set()
        while len(ready) < self._ranks:
            for rank, message in self._receive("start"):
                match message:
                    case Starting():
                        said[rank] = message
                        on_start(describe_start(said, rank))
                    case Loaded():
                        loaded.add(rank)
                        if len(loaded) == self._ranks:
                            self._send_all(AllLoaded(wave=self._wave))
                    case Ready():
                        self.ready = message
                        ready.add(rank)

    def submit(self, requests_by_rank: Sequence[Sequence[Request]]) -> None:
        wave = self._next_wave()
        self._send([Work(wave=wave, requests=list(requests)) for requests in requests_by_rank])

    def abort(self, request_ids: Sequence[int]) -> None:
        if self._ended:
            return
        self.cancel(request_ids)
        self._answers(self.ask())  # ranks take messages in order, so one that answers has forgotten the requests

    def cancel(self, request_ids: Sequence[int]) -> None:
        if not self._ended:
            self._send_all(Work(wave=self._next_wave(), abort=list(request_ids)))

    def poll(self) -> list[TokenOutput]:
        self._check()
        if not self._kept:
            self._keep_tokens(self._receive("generate"))
        outputs, self._kept = self._kept, []
        return outputs

    def receive(self, wake: zmq.Socket[bytes], *, patient: bool) -> list[tuple[int, FromWorker]]:
        """Wait for messages, and return them with their ranks; none if `wake` is readable first, or after 100 ms.

        `AsyncEngine` uses it instead of `poll`. patient: no rank has work, so silence is no error. Raises when a rank
        fails and, unless `patient`, when all ranks are silent for too long.
        """
        self._check()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(wake, zmq.POLLIN)
        poller.poll(_POLL_MS)
        messages = self._read(0)
        self._check_alive("serve")
        if messages or patient:
            self._heard_at = time.monotonic()
        elif time.monotonic() > self._heard_at + self._patience_s:
            raise self._silence(self._patience_s, "serve")
        return messages

    def ask(self, *, timeline: bool = False) -> int:
        """Ask all ranks, and return the wave. Each rank sends an `Answer` with this wave between two steps."""
        wave = self._next_wave()
        self._send_all(Ask(wave=wave, timeline=timeline))
        return wave

    def send_policy(self, policy: OverlapPolicy) -> int:
        """Like `reconfigure` without waiting: every rank sends an `Answer` once it has changed. Returns the wave."""
        wave = self._next_wave()
        self._send_all(Reconfigure(wave=wave, policy=policy))
        return wave

    def reconfigure(self, policy: OverlapPolicy) -> None:
        self._answers(self.send_policy(policy))

    def statistics(self) -> list[dict[str, Any]]:
        return [answer.stats for answer in self._answers(self.ask())]

    def timelines(self) -> list[list[StepTimeline]]:
        return [answer.timeline for answer in self._answers(self.ask(timeline=True))]

    def close(self) -> None:
        """Tell the workers to stop, kill those that have not after 5 s, and remove their folder."""
        patience_s = 0.0
        try:
            if not self._ended:
                self._ended = "it was closed"
                self._wave += 1
                self._send_all(Stop(wave=self._wave))
                patience_s = _STOP_S
        finally:
            try:
                self._processes.close(patience_s=patience_s)
            finally:
                if not self._socket.closed:
                    self._socket.close()
                    self._context.term()

    # ---- messages

    def _next_wave(self) -> int:
        self._check()
        self._wave += 1
        return self._wave

    def _send(self, message_by_rank: Sequence[ToWorker]) -> None:
        """Send to all ranks or none: all messages are encoded before the first is sent."""
        for rank, body in enumerate([encode(message) for message in message_by_rank]):
            self._socket.send_multipart([str(rank).encode(), body])

    def _send_all(self, message: ToWorker) -> None:
        self._send([message] * self._ranks)

    def _answers(self, wave: int) -> list[Answer]:
        """Wait for the answers of all ranks. Outputs that arrive in the meantime are kept for the next `poll`."""
        answers: dict[int, Answer] = {}
        while len(answers) < self._ranks:
            messages = self._receive("answer")
            self._keep_tokens(messages)
            for rank, message in messages:
                if isinstance(message, Answer) and message.wave == wave:
                    answers[rank] = message
        return [answers[rank] for rank in range(self._ranks)]

    def _keep_tokens(self, messages: Sequence[tuple[int, FromWorker]]) -> None:
        for _, message in messages:
            if isinstance(message, Tokens):
                self._kept.extend(message.outputs)

    def _receive(self, what: str) -> list[tuple[int, FromWorker]]:
        """Wait for at least one message. Raises when a rank fails, or when all ranks are silent for too long."""
        patience_s = max(self._patience_s, 1.5 * START_S) if what == "start" else self._patience_s
        deadline = time.monotonic() + patience_s
        while True:
            messages = self._read(_POLL_MS)
            self._check_alive(what)
            if messages:
                return messages
            if time.monotonic() > deadline:
                raise self._silence(patience_s, what)

    def _check_alive(self, what: str) -> None:
        if self._failures or self._processes.any_ended():
            raise self._failure(what)

    def _read(self, timeout_ms: int) -> list[tuple[int, FromWorker]]:
        messages = []
        while self._socket.poll(timeout_ms):
            timeout_ms = 0
            identity, body = self._socket.recv_multipart()
            rank, message = int(identity), decode_from_worker(body)
            if isinstance(message, Warned):
                self._warnings.log(message)
                continue
            if isinstance(message, Failed):
                self._failures[rank] = message
            messages.append((rank, message))
        return messages

    # ---- failures

    def _silence(self, patience_s: float, what: str) -> EngineError:
        reason = f"no rank answered for {patience_s:.0f} s ({what}): {self._board.describe()}"
        return self._end(reason, remedy="raise timeout_s if steps are long")

    def _failure(self, what: str) -> AntiphonError:
        """Find the cause, and end. When one rank fails, its peers fail too, so all ranks get a moment to report."""
        deadline = time.monotonic() + _CAUSE_S
        some_missing = True
        while some_missing:
            some_missing = time.monotonic() < deadline and not all(
                rank in self._failures or self._processes.ended(rank) for rank in range(self._ranks)
            )
            self._read(_POLL_MS)  # even if none is missing: the last words of a rank that has ended may still arrive
            self._read_reports()
        for rank in range(self._ranks):
            if self._processes.killed(rank):
                return self._end(self._processes.obituary(rank, what))
        for rank, failure in self._failures.items():
            if failure.kind != "PeerError":
                return self._end_by(rank, failure, what)
        for rank in range(self._ranks):
            if self._processes.ended(rank) and rank not in self._failures:
                return self._end(self._processes.obituary(rank, what))
        return self._end_by(*next(iter(self._failures.items())), what)

    def _read_reports(self) -> None:
        """Read the reports that ranks could only write to files. They come first: other failures follow from them."""
        found = {rank: read_report(rank, self._processes.folder) for rank in range(self._ranks)}
        reports = {rank: report for rank, report in found.items() if report is not None}
        self._failures = reports | {rank: f for rank, f in self._failures.items() if rank not in reports}

    def _end_by(self, rank: int, failure: Failed, what: str) -> AntiphonError:
        kind = {"ModelError": ModelError, "OptionError": OptionError}.get(failure.kind)
        if kind is not None:
            self._end(failure.message)
            return kind(**(failure.fields or {"fact": failure.message}))
        error = self._end(f"rank {rank} failed during {what}: {failure.message}")
        if failure.traceback:
            error.add_note(f"On rank {rank}:\n{failure.traceback}")
        return error

    def _end(self, reason: str, *, remedy: str = "") -> EngineError:
        self._ended = reason
        self.close()
        return EngineError(reason, remedy=f"{remedy}{', and ' if remedy else 'the engine has ended, '}make a new LLM")

    def _check(self) -> None:
        if self._ended:
            raise EngineError("this engine has ended", limit=self._ended, remedy="make a new LLM")
