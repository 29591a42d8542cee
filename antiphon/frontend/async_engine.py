"""The engine of a server: requests come and go while others run.

    event loop                     engine thread                      ranks
    open, cancel, statistics ───►  commands ──► messages ─────────►   steps
    streams ◄─── call_soon ──────  outputs  ◄── messages ◄─────────   tokens

The ranks are always processes, one alone too, so that the event loop never waits for a step. One thread owns the
client of the ranks; it sleeps until a rank or the event loop has something for it. Everything else, requests and their
streams too, belongs to the event loop. When a rank fails, every open stream and every later call gets one error.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import zmq

from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.config.memory import check_memory
from antiphon.core.errors import EngineError, OptionError
from antiphon.core.sampling import SamplingParams
from antiphon.engine.messages import Answer, FromWorker, Tokens
from antiphon.engine.scheduling.request import Request, TokenOutput
from antiphon.frontend.open_request import OpenRequest
from antiphon.frontend.outputs import Collector
from antiphon.frontend.prompts import Prompt, RequestMaker, most_tokens
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer, with_end_token_of
from antiphon.frontend.worker_client import WorkerClient

logger = logging.getLogger("antiphon.engine")

_WAKE = "inproc://antiphon-wake"


@dataclass(slots=True)
class _Running:
    """A request that is with a rank."""

    opened: OpenRequest
    rank: int
    num_tokens: int  # that it may come to


@dataclass(slots=True)
class _Question:
    """answer: of the event loop; `None` if nobody waits for it."""

    answer: asyncio.Future[list[dict[str, Any]]] | None = None
    by_rank: dict[int, dict[str, Any]] = field(default_factory=dict)

    def tell(self, stats: list[dict[str, Any]]) -> None:
        if self.answer is not None and not self.answer.done():  # whoever asked may have gone
            self.answer.set_result(stats)


class AsyncEngine:
    """The ranks, for one event loop.

        engine = AsyncEngine(EngineConfig(ranks=2))  # returns when the ranks are ready
        engine.attach()                              # in the event loop
        with engine.open("Once upon a time", SamplingParams(max_tokens=32)) as request:
            async for item in request:
                print(item.delta.text)

    Raises as `antiphon.LLM` does. on_failure: called in the event loop, once, when the engine has ended by itself.
    """

    def __init__(self, options: EngineConfig, *, on_start: Callable[[str], None] | None = None) -> None:
        config = options.resolve()
        for sentence in config.checkpoint_notes:
            logger.warning(sentence)
        check_memory(config)
        options = config.options
        self.tokenizer = NoTokenizer() if options.load_format == "dummy" else Tokenizer(options.model)
        config = with_end_token_of(self.tokenizer, config)
        self._client = WorkerClient(config, on_start)
        ready = self._client.ready
        self.config: ResolvedConfig = config.started(
            device_name=ready.device_name,
            transport_name=ready.transport_name,
            data_path=ready.data_path,
            cache=ready.cache,
        )
        self.error: EngineError | None = None
        self.on_failure: Callable[[EngineError], None] | None = None
        self._requests = RequestMaker(self.config, self.tokenizer)
        self._logits_dtype = torch.promote_types(self.config.dtype, torch.float32)
        self._running: dict[int, _Running] = {}
        self._load = [0] * options.ranks
        self._waiting: set[asyncio.Future[list[dict[str, Any]]]] = set()  # for answers
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
        """Belong to the running event loop from now on, and start to serve."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Results under way, on the ranks or on their way to them."""
        return len(self._running)

    def open(self, prompt: Prompt, params: SamplingParams, *, streaming: bool = True) -> OpenRequest:
        """Start a request on the rank with the fewest tokens to come. Raises `RequestError` if it cannot be served.

        streaming: whether the texts of deltas are wanted; without it they can be empty, and cost less.
        """
        (opened,) = self.open_all([prompt], params, streaming=streaming)
        return opened

    def open_all(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, streaming: bool = True
    ) -> list[OpenRequest]:
        """Start a request for every prompt, or none: as `open`, but all of them are checked before the first starts."""
        if self.error is not None:
            raise self.error
        by_rank: list[list[Request]] = [[] for _ in self._load]
        found = []
        for requests in self._requests.make(prompts, [params] * len(prompts)):
            collectors = {
                request.request_id: Collector(
                    self.tokenizer, request, logits_dtype=self._logits_dtype, streaming=streaming
                )
                for request in requests
            }
            opened = OpenRequest(collectors, requests[0].prompt_ids, self._forget)
            for request in requests:
                rank = self._load.index(min(self._load))
                self._load[rank] += most_tokens(request)
                self._running[request.request_id] = _Running(opened, rank, most_tokens(request))
                by_rank[rank].append(request)
            found.append(opened)
        self._command(lambda: self._client.submit(by_rank))
        return found

    async def statistics(self) -> list[dict[str, Any]]:
        """`StepEngine.statistics` of every rank, when they are between two steps."""
        return await self._ask(self._client.ask)

    async def reconfigure(self, *, dbo: str) -> None:
        """Change `dbo` of all ranks while nothing is under way. Raises `OptionError` for another value, or if not."""
        if self._running:
            raise OptionError(f"{self.num_open} results are under way; change dbo when they have finished")
        policy = self.config.settle(replace(self.config.options.policy, dbo=dbo)).policy
        await self._ask(lambda: self._client.send_policy(policy))

    async def close(self) -> None:
        """End the ranks. Open requests get an `EngineError`."""
        self._fail(EngineError("the engine was closed"), announce=False)
        self._closing = True
        if self._loop is None:
            self._thread.start()  # to close what it owns
        if self._thread.is_alive():
            self._command(_nothing)
        await asyncio.to_thread(self._thread.join)
        self._wake_sender.close(0)
        self._wake_context.term()

    def _forget(self, request_ids: Sequence[int]) -> None:
        known = [number for number in request_ids if self._drop(number)]
        if not known or self.error is not None:
            return
        self._command(lambda: self._client.cancel(known))
        if not self._running:
            # Nothing is to come any more, but whether the ranks have heard it, and live, is to be known.
            self._command(lambda: self._put_question(self._client.ask, _Question()))

    def _drop(self, request_id: int) -> bool:
        """Whether it was there."""
        running = self._running.pop(request_id, None)
        if running is None:
            return False
        self._load[running.rank] -= running.num_tokens
        return True

    def _command(self, command: Callable[[], None]) -> None:
        """To be run by the engine thread."""
        self._commands.append(command)
        with suppress(zmq.Again):  # it has not read earlier calls yet, and will find this command with them
            self._wake_sender.send(b"", zmq.DONTWAIT)

    async def _ask(self, send: Callable[[], int]) -> list[dict[str, Any]]:
        """Have the engine thread send what every rank answers, and wait for the answers."""
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
            running = self._running.get(output.request_id)
            if running is None:
                continue  # it was cancelled
            if output.finish_reason is not None:
                self._drop(output.request_id)
            running.opened.put((at_s, output))

    def _fail(self, error: EngineError, *, announce: bool = True) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(error)
        if self.error is not None:
            return
        self.error = error
        for opened in {id(running.opened): running.opened for running in self._running.values()}.values():
            opened.put(error)
        self._running.clear()
        if announce and self.on_failure is not None:
            self.on_failure(error)

    # ---- the engine thread

    def _run(self) -> None:
        try:
            while not self._closing:
                while self._commands:
                    self._commands.popleft()()
                idle = not self._running and not self._questions
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
        if len(question.by_rank) == len(self._load):
            del self._questions[answer.wave]
            stats = [question.by_rank[number] for number in range(len(self._load))]
            self._call(lambda: question.tell(stats))

    def _call(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(function)


def _nothing() -> None:
    """A command that only wakes the thread."""
