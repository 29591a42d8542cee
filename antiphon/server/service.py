"""What all requests share: the engine, how much may be under way, and the phases of the server's life.

starting ──► serving ──► draining          a rank that fails: any ──► dead
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
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
"""Characters from which a text is tokenised beside the event loop."""
_LONG_CHAT = 3072
"""The same for the messages of a chat, whose template takes time too."""
_LONGEST_TAG = 32
"""Tokens among which the end of a chat's prompt may have a tag that opens the reasoning."""
_STATISTICS_S = 2.0


class Phase(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"


class Service:
    """Belongs to the event loop in which it was made. `metrics`; `cut` ends all open requests with its error.

    detail: a word more about the phase, for /health. failed, failure: set when the engine has ended by itself.
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
        self._idle = asyncio.Event()
        self._idle.set()
        self._engine: AsyncEngine | None = None
        self.reasoning = None if options.reasoning_parser is None else reasoning_tags(options.reasoning_parser)
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    # ---- phases

    def serve(self, engine: AsyncEngine) -> None:
        """The engine is ready, and belongs to the caller still.

        Raises `OptionError` if its answers do not show the tags of the reasoning parser.
        """
        for tag in () if self.reasoning is None else (self.reasoning.start, self.reasoning.end):
            if engine.tokenizer.special_id(tag) is not None:
                raise OptionError(
                    f"reasoning_parser={self.options.reasoning_parser!r} looks for {tag!r}, which is a special token "
                    "of this model's tokenizer, so that answers do not show it; leave the option out"
                )
        engine.on_failure = self.fail
        engine.attach()
        self._engine = engine
        self.phase, self.detail = Phase.SERVING, ""

    def fail(self, error: EngineError) -> None:
        """The engine has ended by itself. Open requests have got its error already."""
        self.phase, self.detail = Phase.DEAD, str(error)
        self.failure = error
        self.failed.set()

    def drain(self) -> None:
        """No new requests from now on."""
        if self.phase in (Phase.STARTING, Phase.SERVING):
            self.phase = Phase.DRAINING

    async def wait_until_idle(self) -> None:
        await self._idle.wait()

    def cut_all(self) -> None:
        """End what is open with an error."""
        if not self.cut.done():
            self.cut.set_result(ApiError(503, "the server ends; send the request again", code="shutting_down"))

    def close(self) -> None:
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    # ---- for requests

    @property
    def engine(self) -> AsyncEngine:
        """Raises `ApiError` 503 unless it serves."""
        if self.phase is Phase.SERVING and self._engine is not None:
            return self._engine
        reason = {
            Phase.STARTING: "the server is starting; try again soon",
            Phase.DRAINING: "the server is about to end; use another one",
        }.get(self.phase, f"the engine has ended: {self.detail}")
        retry_after_s = 1 if self.phase is Phase.STARTING else None
        raise ApiError(503, reason, code=str(self.phase), retry_after_s=retry_after_s)

    @property
    def tokenizer(self) -> Tokenizer | NoTokenizer:
        """Of the engine that serves, or has served: open requests need it while the server drains."""
        return (self._engine or self.engine).tokenizer

    def check_model(self, name: str) -> None:
        """Raises `ApiError` 404 unless it is one of ours; an empty name is."""
        if name and name not in self.options.served_model_names:
            names = ", ".join(self.options.served_model_names)
            raise ApiError(
                404, f"model {name!r} is not served here; use {names}", param="model", code="model_not_found"
            )

    @contextmanager
    def admit(self, num_results: int, param: str) -> Iterator[None]:
        """Count results that are under way. Raises `ApiError` 429 if there are too many, 503 unless it serves."""
        most = self.options.max_queue
        if num_results > most:
            raise ApiError(
                400,
                f"{param} asks for {num_results} results, but at most {most} may be under way; send fewer",
                param=param,
            )
        if self.num_open + num_results > most:
            raise ApiError(
                429,
                f"{self.num_open} results are under way, and at most {most} may be; send the request again later",
                code="queue_full",
                retry_after_s=1,
            )
        _ = self.engine
        self.num_open += num_results
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open -= num_results
            if not self.num_open:
                self._idle.set()

    async def encode(self, text: str, *, add_special_tokens: bool, among: int = 0) -> list[int]:
        """Token ids of a text. among: characters of all texts of the request. Raises `RequestError`."""
        tokenizer = self.tokenizer
        if not tokenizer.has_text:
            raise RequestError("prompt 0 is a text, but a run with dummy weights has no tokenizer; use token ids")

        def work() -> list[int]:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

        if max(len(text), among) < _LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def encode_chat(self, messages: Sequence[Message], fields: ChatFields) -> list[int]:
        """Token ids of a chat. Raises `RequestError` for what its template refuses."""
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
            # What a request's variables make the template do cannot be told from their length.
            if num_characters < _LONG_CHAT and not fields.chat_template_kwargs:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        except ModelError as error:
            raise RequestError(f"messages: {error}") from error

    def reasons_first(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the answer to a chat begins inside the reasoning, which the end of its prompt has opened."""
        tags = self.reasoning
        ending = self.tokenizer.decode(prompt_ids[-_LONGEST_TAG:], skip_special=False)
        return tags is not None and ending.rstrip().endswith(tags.start)

    async def statistics(self) -> list[dict[str, Any]] | None:
        """Of the ranks; `None` if they do not answer now."""
        if self._engine is None or self.phase is Phase.DEAD:
            return None
        try:
            async with asyncio.timeout(_STATISTICS_S):
                return await self._engine.statistics()
        except (TimeoutError, EngineError):
            return None
