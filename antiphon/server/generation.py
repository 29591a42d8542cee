"""Runs a job and sends its answer: whole, or as server-sent events.

    request ──► work: open, track, send ───────────────► answer
                  ▲ cancelled when the client disconnects, the time limit passes, or the server stops

However it ends, the `with` blocks of the open requests tell the ranks, which free the KV blocks before the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from antiphon.core.errors import EngineError, OptionError, RequestError
from antiphon.frontend.open_request import OpenRequest, StreamItem
from antiphon.server.errors import ApiError, to_json
from antiphon.server.jobs import Job
from antiphon.server.service import Service

CLIENT_GONE = 499
"""The status to log when a client disconnected before it got one."""
_LAST_WORDS_S = 5.0  # time limit for sending an error to a client that may not be reading

_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Generation(Response):
    """The answer to one request. Takes its arrival and its log line from the state that `Guard` has set."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self._service = job.service
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        self._arrived_s: float = scope["state"]["arrived_s"]
        self._log: dict[str, Any] = scope["state"]["log"]
        limit_s = service.options.request_timeout_s
        work = asyncio.create_task(self._work(scope, receive, send))
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
                fact, remedy = f"the request took longer than {limit_s:g} s", "request fewer tokens"
                error = ApiError(504, fact, remedy=remedy, code="timeout")
        finally:
            await _cancel(work)
            await _cancel(gone)
        if error is not None:
            self._log |= {"status": error.status, "param": error.option}
            if error.status != CLIENT_GONE:
                await self._send_error(error, scope, receive, send)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        job, service = self._job, self._service
        self._log |= {"stream": job.stream, "num_results": job.num_results}
        with service.admit(job.num_results, job.prompt_field), ExitStack() as stack:
            try:
                opened = service.engine.open_all(await job.prompts(), job.params, streaming=job.stream)
            except (OptionError, RequestError) as error:
                raise job.refusal(error) from None
            tracked = [stack.enter_context(_Tracked(one, service, self._arrived_s, self._log)) for one in opened]
            if job.stream:
                await self._stream(tracked, opened, send)
                return
            await _run_all([one.finish() for one in tracked])
            # The logprobs of a long prompt are many thousands of objects; encoding them must not stall other requests.
            body = await asyncio.to_thread(job.whole, opened) if job.is_large(opened) else job.whole(opened)
        self._started = True
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, tracked: Sequence[_Tracked], opened: Sequence[OpenRequest], send: Send) -> None:
        job = self._job
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": list(_EVENTS)})

        async def forward(place: int, one: _Tracked) -> None:
            async for item in one.opened:
                one.count(item)
                if job.is_large_piece(place, one.opened, item):
                    events = await asyncio.to_thread(_events_of, job, place, one.opened, item)
                else:
                    events = _events_of(job, place, one.opened, item)
                if events:
                    await send(_part(events))

        await _run_all([forward(place, one) for place, one in enumerate(tracked)])
        await send(_part(job.last_chunks(opened), more=False))

    async def _send_error(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                if self._started:
                    await send(_part(b"data: " + to_json(error.body()) + b"\n\n", more=False))
                else:
                    await error.answer()(scope, receive, send)


class _Tracked:
    """Counts the tokens of an open request. The end of its `with` block cancels what has not finished."""

    def __init__(self, opened: OpenRequest, service: Service, arrived_s: float, log: dict[str, Any]) -> None:
        self.opened = opened
        self._service = service
        self._arrived_s = arrived_s
        self._log = log
        self._token_s: dict[int, float] = {}  # when the last token arrived, by result
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
        counts = {
            "num_prompt": len(opened.prompt_ids),
            "num_generated": opened.num_tokens,
            "num_cached": first.num_cached,
        }
        seconds = time.monotonic() - self._arrived_s
        self._service.metrics.request_finished(reason=reason, seconds=seconds, **counts)
        for name, count in counts.items():
            self._log[name] = self._log.get(name, 0) + count
        self._log["reason"] = reason

    async def finish(self) -> None:
        async for item in self.opened:
            self.count(item)

    def count(self, item: StreamItem) -> None:
        num_tokens = len(item.delta.token_ids)
        if not num_tokens:
            return
        metrics, at_s = self._service.metrics, item.at_s
        if not self._token_s:
            metrics.first_token(at_s - self._arrived_s)
            self._log.setdefault("first_token_s", at_s - self._arrived_s)
            num_tokens -= 1
        if num_tokens:
            metrics.next_tokens(num_tokens, max(0.0, at_s - self._token_s.get(item.index, self._last_s)))
        self._token_s[item.index] = self._last_s = at_s


def _events_of(job: Job, place: int, opened: OpenRequest, item: StreamItem) -> bytes:
    return b"".join([job.chunk(choice) for choice in job.pieces(place, opened, item)])


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _run_all(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run these concurrently. The first error cancels the others, and is raised."""
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
    """Cancel a task, wait until it has ended, and drop its error."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


def _error_of(work: asyncio.Task[None]) -> ApiError | None:
    """The error to send to the client. An error that is a bug of ours is raised again."""
    error = work.exception()
    if error is None or isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, OSError):
        return ApiError(CLIENT_GONE, "the client has disconnected")
    raise error
