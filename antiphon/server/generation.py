"""Runs a job and sends its answer: whole, or as server-sent events.

    request ──► work: open, follow, send ──────────────► answer
                  ▲ cancelled when the client disconnects, the time limit passes, or the server stops

Whatever ends it, the `with` blocks of the open requests tell the ranks, which free the KV blocks before the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from antiphon.core.errors import EngineError, OptionError, RequestError
from antiphon.frontend.open_request import OpenRequest, StreamItem
from antiphon.server.errors import ApiError
from antiphon.server.jobs import Job, to_json
from antiphon.server.service import Service

CLIENT_GONE = 499
"""The status in the log when the client has disconnected before it got one."""
_LAST_WORDS_S = 5.0  # how long an error waits for a client that does not read

_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Generation(Response):
    """The answer to one request. arrived_s: its arrival by `time.monotonic`. log: fields of its log line, added to."""

    def __init__(self, job: Job, service: Service, *, arrived_s: float, log: dict[str, Any]) -> None:
        super().__init__()
        self._job = job
        self._service = service
        self._arrived_s = arrived_s
        self._log = log
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        limit_s = service.options.request_timeout_s
        work = asyncio.create_task(self._work(send))
        gone = asyncio.create_task(_wait_until_gone(receive))
        ending: list[asyncio.Future[Any]] = [work, gone, service.cut]
        try:
            left_s = self._arrived_s + limit_s - time.monotonic()
            await asyncio.wait(ending, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                error = _error_of(work)
            elif gone.done():
                error = ApiError(CLIENT_GONE, "the client has disconnected")
            elif service.cut.done():
                error = service.cut.result()
            else:
                fact, remedy = f"the request took longer than {limit_s:g} s", "ask for fewer tokens"
                error = ApiError(504, fact, remedy=remedy, code="timeout")
        finally:
            await _cancel(work)
            await _cancel(gone)
        if error is not None:
            self._log |= {"status": error.status, "param": error.option}
            if error.status != CLIENT_GONE:
                await self._tell(error, send)

    async def _work(self, send: Send) -> None:
        job, service = self._job, self._service
        self._log |= {"stream": job.stream, "num_results": job.num_results}
        with service.admit(job.num_results, job.prompt_field), ExitStack() as stack:
            prompts = await job.prompts()
            opened = self._open(prompts)
            followed = [stack.enter_context(_Followed(one, service, self._arrived_s, self._log)) for one in opened]
            if job.stream:
                await self._stream(followed, opened, send)
                return
            await _together([one.finish() for one in followed])
            # The logprobs of a long prompt are many thousand objects; encoding them must not stall other requests.
            body = await asyncio.to_thread(job.whole, opened) if job.is_large(opened) else job.whole(opened)
        self._started = True
        await send_whole(200, body, {}, send)

    def _open(self, prompts: Sequence[list[int]]) -> list[OpenRequest]:
        job = self._job
        try:
            return self._service.engine.open_all(prompts, job.params, streaming=job.stream)
        except (OptionError, RequestError) as error:
            raise job.refusal(error) from None

    async def _stream(self, followed: Sequence[_Followed], opened: Sequence[OpenRequest], send: Send) -> None:
        job = self._job
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": list(_EVENTS)})

        async def pass_on(place: int, one: _Followed) -> None:
            async for item in one.opened:
                one.saw(item)
                if job.is_large_piece(place, one.opened, item):
                    events = await asyncio.to_thread(_events_of, job, place, one.opened, item)
                else:
                    events = _events_of(job, place, one.opened, item)
                if events:
                    await send(_part(events))

        await _together([pass_on(place, one) for place, one in enumerate(followed)])
        await send(_part(job.last_chunks(opened), more=False))

    async def _tell(self, error: ApiError, send: Send) -> None:
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                if self._started:
                    await send(_part(b"data: " + to_json(error.body()) + b"\n\n", more=False))
                else:
                    self._started = True
                    await send_error(error, send)
        except TimeoutError:
            pass  # the client does not read


class _Followed:
    """Counts the tokens of an open request; the end of its `with` block cancels what is left."""

    def __init__(self, opened: OpenRequest, service: Service, arrived_s: float, log: dict[str, Any]) -> None:
        self.opened = opened
        self._service = service
        self._arrived_s = arrived_s
        self._log = log
        self._heard_s: dict[int, float] = {}  # when the last token came, by result
        self._last_s = 0.0

    def __enter__(self) -> Self:
        self._service.metrics.request_started()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        opened = self.opened
        first = opened.collectors[0]
        if opened.finished:
            reason = first.finish_reason or "stop"
        else:
            reason = "error" if isinstance(error, EngineError) else "abort"
        opened.cancel()
        self._service.metrics.request_finished(
            reason=reason,
            num_prompt=len(opened.prompt_ids),
            num_generated=opened.num_tokens,
            num_cached=first.num_cached,
            seconds=time.monotonic() - self._arrived_s,
        )
        for name, count in (("num_prompt", len(opened.prompt_ids)), ("num_generated", opened.num_tokens)):
            self._log[name] = self._log.get(name, 0) + count
        self._log["num_cached"] = self._log.get("num_cached", 0) + first.num_cached
        self._log["reason"] = reason

    async def finish(self) -> None:
        async for item in self.opened:
            self.saw(item)

    def saw(self, item: StreamItem) -> None:
        num_tokens = len(item.delta.token_ids)
        if not num_tokens:
            return
        metrics, at_s = self._service.metrics, item.at_s
        if not self._heard_s:
            metrics.first_token(at_s - self._arrived_s)
            self._log.setdefault("first_token_s", at_s - self._arrived_s)
            num_tokens -= 1
        if num_tokens:
            metrics.next_tokens(num_tokens, max(0.0, at_s - self._heard_s.get(item.index, self._last_s)))
        self._heard_s[item.index] = self._last_s = at_s


def _events_of(job: Job, place: int, opened: OpenRequest, item: StreamItem) -> bytes:
    return b"".join([job.chunk(choice) for choice in job.pieces(place, opened, item)])


async def send_error(error: ApiError, send: Send) -> None:
    """Answer with an error, whole."""
    await send_whole(error.status, to_json(error.body()), error.headers, send)


async def send_whole(status: int, body: bytes, headers: Mapping[str, str], send: Send) -> None:
    """Answer with JSON, whole."""
    head = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    raw = [(name.encode(), value.encode()) for name, value in head.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send(_part(body, more=False))


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _together(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run them concurrently; the first error cancels the others."""
    if len(works) == 1:
        await works[0]
        return
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            await _cancel(task)


async def _cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has ended; its error is dropped."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


def _error_of(work: asyncio.Task[None]) -> ApiError | None:
    """The error to send to the client. Re-raises what is a bug of ours."""
    error = work.exception()
    if error is None or isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, OSError):
        return ApiError(CLIENT_GONE, "the client has disconnected")
    raise error
