"""The caller's view of an open request. It belongs to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from antiphon.core.errors import EngineError
from antiphon.engine.scheduling.request import TokenOutput
from antiphon.frontend.outputs import Collector, Delta


@dataclass(frozen=True, slots=True)
class StreamItem:
    """A piece of result `index` of a request, and the time of its arrival (`time.monotonic`)."""

    index: int
    delta: Delta
    at_s: float


class OpenRequest:
    """One prompt and its n results. Iterate to the end, or `cancel`; a `with` block cancels what is left.

    collectors: one for each result, by index. num_tokens: tokens generated so far in all results.
    """

    def __init__(
        self,
        collectors: dict[int, Collector],
        prompt_ids: tuple[int, ...],
        forget: Callable[[Sequence[int]], None],
    ) -> None:
        """collectors: by request id. forget: cancels requests in the engine and on the ranks."""
        self.prompt_ids = prompt_ids
        self.num_tokens = 0
        self._forget = forget
        self._by_id = collectors
        self._index = {request_id: index for index, request_id in enumerate(collectors)}
        self._arrived: deque[tuple[float, TokenOutput] | EngineError] = deque()
        self._waiter: asyncio.Future[None] | None = None  # the iterator, while nothing has arrived

    @property
    def collectors(self) -> list[Collector]:
        return list(self._by_id.values())

    @property
    def finished(self) -> bool:
        return all(collector.finished for collector in self._by_id.values())

    def __enter__(self) -> OpenRequest:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Cancel the results that have not finished. The ranks free their KV blocks before their next step."""
        self._forget([number for number, collector in self._by_id.items() if not collector.finished])

    async def __aiter__(self) -> AsyncIterator[StreamItem]:
        """Yield pieces as they arrive. Raises `EngineError` if the engine ends before all results have finished."""
        while not self.finished:
            if not self._arrived:
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            arrived = self._arrived.popleft()
            if isinstance(arrived, EngineError):
                raise arrived
            at_s, output = arrived
            collector = self._by_id[output.request_id]
            if collector.finished:
                continue
            delta = collector.take(output)
            self.num_tokens += len(delta.token_ids)
            if collector.must_cancel:
                self._forget([output.request_id])
            yield StreamItem(self._index[output.request_id], delta, at_s)

    def put(self, arrived: tuple[float, TokenOutput] | EngineError) -> None:
        """Add an output with its arrival time, or the error that has ended the engine. Called by the engine."""
        self._arrived.append(arrived)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
