"""What all requests share: the engine, the limit on open results, and the phase of the server.

starting ──► serving ──► draining          when a rank fails: any ──► dead
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any

from antiphon.core.errors import EngineError, ModelError, OptionError, RequestError
from antiphon.frontend.async_engine import AsyncEngine
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer
from antiphon.server.errors import ApiError
from antiphon.server.metrics import ServerMetrics
from antiphon.server.options import ServerOptions
from antiphon.server.protocol import ChatFields, Message
from antiphon.server.reasoning import reasoning_tags

_LONG_TEXT = 4096
"""Texts of at least this many characters are tokenized off the event loop."""
_LONG_CHAT = 3072
"""The same for the messages of a chat, whose template takes time, too."""
_STATISTICS_S = 2.0


class Phase(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"


class Service:
    """The state of one server. It belongs to the event loop in which it was created.

    detail: more about the phase, for /health. idle: set while no request is open.
    cut: when set, ends all open requests with its error. failed, failure: set when the engine has failed.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.model_name = options.served_model_names[0]
        self.metrics = ServerMetrics(self.model_name)
        self.started_at = int(time.time())
        self.phase = Phase.STARTING
        self.detail = ""
        self.num_open = 0
        self.cut: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self.failed = asyncio.Event()
        self.failure: EngineError | None = None
        self.idle = asyncio.Event()
        self.idle.set()
        self._engine: AsyncEngine | None = None
        self.reasoning = None if options.reasoning_parser is None else reasoning_tags(options.reasoning_parser)
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    # ---- phases

    def serve(self, engine: AsyncEngine) -> None:
        """Accept requests for an engine that is ready. The caller still owns it.

        Raises `OptionError` if its outputs cannot show the tags of the reasoning parser.
        """
        for tag in () if self.reasoning is None else (self.reasoning.start, self.reasoning.end):
            if engine.tokenizer.special_id(tag) is not None:
                parser = self.options.reasoning_parser
                raise OptionError(
                    f"reasoning_parser={parser!r} cannot find {tag!r}",
                    limit="it is a special token of this model's tokenizer, so outputs do not show it",
                    remedy="leave the option out",
                    option="reasoning_parser",
                    value=parser,
                )
        engine.on_failure = self.fail
        engine.attach()
        self._engine = engine
        self.phase, self.detail = Phase.SERVING, ""

    def fail(self, error: EngineError) -> None:
        """Note that the engine has failed. Open requests have already received its error."""
        self.phase, self.detail = Phase.DEAD, str(error)
        self.failure = error
        self.failed.set()

    def drain(self) -> None:
        """Accept no new requests."""
        if self.phase in (Phase.STARTING, Phase.SERVING):
            self.phase = Phase.DRAINING

    def cut_all(self) -> None:
        """End all open requests with an error."""
        if not self.cut.done():
            error = ApiError(503, "the server is shutting down", remedy="send the request again", code="shutting_down")
            self.cut.set_result(error)

    def close(self) -> None:
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    # ---- for requests

    @property
    def engine(self) -> AsyncEngine:
        """The engine. Raises `ApiError` 503 unless the server is serving."""
        if self.phase is Phase.SERVING and self._engine is not None:
            return self._engine
        fact, remedy = {
            Phase.STARTING: ("the server is starting", "try again soon"),
            Phase.DRAINING: ("the server is shutting down", "send the request to another server"),
        }.get(self.phase, (f"the engine has ended: {self.detail}", ""))
        retry_after_s = 1 if self.phase is Phase.STARTING else None
        raise ApiError(503, fact, remedy=remedy, code=str(self.phase), retry_after_s=retry_after_s)

    @property
    def tokenizer(self) -> Tokenizer | NoTokenizer:
        """The tokenizer, which open requests may still use while the server drains."""
        return (self._engine or self.engine).tokenizer

    def check_model(self, name: str) -> None:
        """Raises `ApiError` 404 for a model that is not served. An empty name means the one that is."""
        if name and name not in self.options.served_model_names:
            names = ", ".join(self.options.served_model_names)
            fact, code = f"model {name!r} is not served here", "model_not_found"
            raise ApiError(404, fact, remedy=f"use {names}", option="model", value=name, code=code)

    @contextmanager
    def admit(self, num_results: int, param: str) -> Iterator[None]:
        """Count open results. Raises `ApiError` 429 if there are too many, 503 unless the server accepts requests."""
        most = self.options.max_queue
        limit = f"at most {most} may be open at once"
        if num_results > most:
            fact = f"{param} asks for {num_results} results"
            raise ApiError(400, fact, limit=limit, remedy="request fewer", option=param, value=num_results)
        if self.num_open + num_results > most:
            fact, remedy = f"{self.num_open} results are open", "send the request again later"
            raise ApiError(429, fact, limit=limit, remedy=remedy, code="queue_full", retry_after_s=1)
        _ = self.engine  # raises unless the server is serving
        self.num_open += num_results
        self.idle.clear()
        try:
            yield
        finally:
            self.num_open -= num_results
            if not self.num_open:
                self.idle.set()

    async def encode(
        self, text: str, *, add_special_tokens: bool, place: int = 0, num_characters: int = 0
    ) -> list[int]:
        """The token ids of prompt `place`. num_characters: of all prompts of the request. Raises `RequestError`."""
        if not self.tokenizer.has_text:
            limit = "with dummy weights there is no tokenizer"
            raise RequestError(f"prompt {place} is a text", limit=limit, remedy="use token ids", option="prompts")
        work = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._tokenize(work, is_short=max(len(text), num_characters) < _LONG_TEXT)

    async def encode_chat(self, messages: Sequence[Message], fields: ChatFields) -> list[int]:
        """The token ids of a chat. Raises `RequestError` if its template refuses it."""
        templated = [message.for_template() for message in messages]
        work = partial(
            self.tokenizer.chat,
            templated,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            template_kwargs={**self.options.chat_template_kwargs, **fields.chat_template_kwargs},
        )
        num_characters = sum(len(str(text)) for message in templated for text in message.values())
        try:
            # A request's variables can make a template slow, however short they are.
            is_short = num_characters < _LONG_CHAT and not fields.chat_template_kwargs
            return await self._tokenize(work, is_short=is_short)
        except ModelError as error:
            raise RequestError(error.fact, limit=error.limit, remedy=error.remedy, option="messages") from error

    async def _tokenize(self, work: Callable[[], list[int]], *, is_short: bool) -> list[int]:
        if is_short:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def statistics(self) -> list[dict[str, Any]] | None:
        """The ranks' statistics; `None` if they do not answer in time."""
        if self._engine is None:
            return None
        try:
            async with asyncio.timeout(_STATISTICS_S):
                return await self._engine.statistics()
        except (TimeoutError, EngineError):
            return None
