"""The engine behind a server: requests come and go while others run.

    event loop                     engine thread                      ranks
    open, cancel, statistics ───►  commands ──► messages ─────────►   steps
    streams ◄─── call_soon ──────  outputs  ◄── messages ◄─────────   tokens

The ranks are always worker processes, even a single one, so that the event loop never waits for a step. The engine
thread owns the client of the ranks and sleeps until a rank or the event loop has something for it. Everything else,
including requests and their streams, belongs to the event loop. When a rank fails, every open stream and every later
call gets the same error.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import zmq

from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.core.errors import EngineError, OptionError
from antiphon.core.sampling import SamplingParams
from antiphon.engine.messages import Answer, FromWorker, Tokens
from antiphon.engine.scheduling.request import TokenOutput
from antiphon.frontend.core import Core
from antiphon.frontend.open_request import OpenRequest
from antiphon.frontend.prompts import Prompt
from antiphon.frontend.worker_client import WorkerClient
from antiphon.launch import Launcher

logger = logging.getLogger("antiphon.engine")

_WAKE = "inproc://antiphon-wake"


@dataclass(slots=True)
class _Question:
    """A question to all ranks. answer: a future of the event loop; `None` if nobody waits for it."""

    answer: asyncio.Future[list[dict[str, Any]]] | None = None
    by_rank: dict[int, dict[str, Any]] = field(default_factory=dict)

    def reply(self, stats: list[dict[str, Any]]) -> None:
        if self.answer is not None and not self.answer.done():  # the caller may have been cancelled
            self.answer.set_result(stats)


class AsyncEngine:
    """An engine for one event loop.

        engine = AsyncEngine(EngineConfig(ranks=2))  # returns when the ranks are ready
        engine.attach()                              # in the event loop
        with engine.open("Once upon a time", SamplingParams(max_tokens=32)) as request:
            async for item in request:
                print(item.delta.text)

    `on_start`, `launcher` and the errors are those of `antiphon.LLM`. on_failure: called once, in the event loop, when
    the engine has ended because of an error.
    """

    def __init__(
        self,
        options: EngineConfig,
        *,
        on_start: Callable[[str], None] | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._core = Core(options)
        self._client = WorkerClient(self._core.config, on_start, launcher=launcher)
        self._core.started(self._client.ready)
        self.tokenizer = self._core.tokenizer
        self.error: EngineError | None = None
        self.on_failure: Callable[[EngineError], None] | None = None
        self._streams: dict[int, OpenRequest] = {}  # by request id
        self._waiting: set[asyncio.Future[list[dict[str, Any]]]] = set()  # answers that callers wait for
        self._commands: deque[Callable[[], None]] = deque()
        self._questions: dict[int, _Question] = {}  # of the engine thread, by wave
        self._closing = False
        self._wake_context = zmq.Context()
        self._wake_receiver = self._wake_context.socket(zmq.PAIR)
        self._wake_receiver.bind(_WAKE)
        self._wake_sender = self._wake_context.socket(zmq.PAIR)
        self._wake_sender.connect(_WAKE)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- for the event loop

    def attach(self) -> None:
        """Bind the engine to the running event loop, and start serving."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def config(self) -> ResolvedConfig:
        """The options of this engine, with every `auto` resolved."""
        return self._core.config

    @property
    def num_open(self) -> int:
        """The number of results under way, on the ranks or on their way to them."""
        return self._core.num_open

    def open(self, prompt: Prompt, params: SamplingParams, *, streaming: bool = True) -> OpenRequest:
        """Start a request on the least loaded rank. Raises `RequestError` if it cannot be served.

        streaming: whether the texts of deltas are needed; if not, they may be empty, which is cheaper.
        """
        (opened,) = self.open_all([prompt], params, streaming=streaming)
        return opened

    def open_all(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, streaming: bool = True
    ) -> list[OpenRequest]:
        """Like `open`, for every prompt or none: all prompts are checked before the first request starts."""
        if self.error is not None:
            raise self.error
        found = []
        placed = self._core.place(prompts, [params] * len(prompts), streaming=streaming)
        for results in placed:
            collectors = {one.request.request_id: one.collector for one in results}
            found.append(OpenRequest(collectors, results[0].request.prompt_ids, self._forget))
            self._streams |= dict.fromkeys(collectors, found[-1])
        by_rank = self._core.by_rank(one for results in placed for one in results)
        self._command(lambda: self._client.submit(by_rank))
        return found

    async def statistics(self) -> list[dict[str, Any]]:
        """Return `StepEngine.statistics` of every rank, taken between two steps."""
        return await self._ask(self._client.ask)

    async def reconfigure(self, *, dbo: str) -> None:
        """Change `dbo` on all ranks. Raises `OptionError` for an unknown value, or if results are under way."""
        if self.num_open:
            raise OptionError(
                f"{self.num_open} results are under way",
                remedy="change dbo when they have finished",
                option="dbo",
                value=dbo,
            )
        policy = self._core.resolve_policy(dbo=dbo)
        await self._ask(lambda: self._client.send_policy(policy.policy))
        self._core.reconfigured(policy, dbo=dbo)

    async def close(self) -> None:
        """Stop the ranks. Open requests get an `EngineError`."""
        self._fail(EngineError("the engine was closed"), announce=False)
        self._closing = True
        if self._loop is None:
            self._thread.start()  # it closes what it owns
        if self._thread.is_alive():
            self._command(lambda: None)  # wakes the thread
        await asyncio.to_thread(self._thread.join)
        self._wake_sender.close(0)
        self._wake_context.term()

    def _forget(self, request_ids: Sequence[int]) -> None:
        known = self._core.forget(request_ids)
        for number in known:
            del self._streams[number]
        if not known or self.error is not None:
            return
        self._command(lambda: self._client.cancel(known))
        if not self.num_open:
            # Nothing is pending: ping the ranks to confirm that they got the cancellation and are alive.
            self._command(lambda: self._put_question(self._client.ask, _Question()))

    def _command(self, command: Callable[[], None]) -> None:
        """Queue a command for the engine thread."""
        self._commands.append(command)
        with suppress(zmq.Again):  # the socket is full of earlier wake-ups; the thread will find this command as well
            self._wake_sender.send(b"", zmq.DONTWAIT)

    async def _ask(self, send: Callable[[], int]) -> list[dict[str, Any]]:
        """Have the engine thread `send` a question to every rank, and wait for all answers."""
        if self.error is not None:
            raise self.error
        answer: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self._waiting.add(answer)
        try:
            self._command(lambda: self._put_question(send, _Question(answer)))
            return await answer
        finally:
            self._waiting.discard(answer)

    def _deliver(self, outputs: Sequence[TokenOutput], at_s: float) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # it was cancelled
            if output.finish_reason is not None:
                self._core.forget([output.request_id])
                del self._streams[output.request_id]
            stream.put((at_s, output))

    def _fail(self, error: EngineError, *, announce: bool = True) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(error)
        if self.error is not None:
            return
        self.error = error
        for stream in {id(stream): stream for stream in self._streams.values()}.values():
            stream.put(error)
        self._core.forget(self._streams)
        self._streams.clear()
        if announce and self.on_failure is not None:
            self.on_failure(error)

    # ---- the engine thread

    def _run(self) -> None:
        try:
            while not self._closing:
                while self._commands:
                    self._commands.popleft()()
                idle = not self._streams and not self._questions
                self._take(self._client.receive(self._wake_receiver, patient=idle))
                with suppress(zmq.Again):
                    while True:
                        self._wake_receiver.recv(zmq.DONTWAIT)
        except BaseException as error:
            failed = error if isinstance(error, EngineError) else EngineError(f"{type(error).__name__}: {error}")
            self._call(lambda: self._fail(failed))
        finally:
            self._wake_receiver.close(0)
            self._client.close()

    def _take(self, messages: Sequence[tuple[int, FromWorker]]) -> None:
        now = time.monotonic()
        outputs: list[TokenOutput] = []
        for rank, message in messages:
            match message:
                case Tokens():
                    outputs += message.outputs
                case Answer() if message.wave in self._questions:
                    self._answer(rank, message)
        if outputs:
            self._call(lambda: self._deliver(outputs, now))

    def _put_question(self, send: Callable[[], int], question: _Question) -> None:
        self._questions[send()] = question

    def _answer(self, rank: int, answer: Answer) -> None:
        question = self._questions[answer.wave]
        question.by_rank[rank] = answer.stats
        if len(question.by_rank) == self.config.options.ranks:
            del self._questions[answer.wave]
            stats = [question.by_rank[number] for number in range(self.config.options.ranks)]
            self._call(lambda: question.reply(stats))

    def _call(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(function)
