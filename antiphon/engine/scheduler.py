"""Continuous batching: what to run next on one rank, and what to do with the result.

Running requests decode in every step; waiting ones join as soon as there is room for their prompt in the step and
for their longest possible text in the KV cache, in order of arrival. So a request that has started never has to stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from antiphon.core.batch import Batch, RequestSlice
from antiphon.engine.kv_cache import BlockPool
from antiphon.engine.request import Request, TokenOutput
from antiphon.engine.sampler import Sampled

__all__ = ["Scheduler"]


class Scheduler:
    """Owns the requests of one rank."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        rank: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.pool = pool
        self.requests: dict[int, Request] = {}
        self._rank = rank
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.requests)

    def add(self, requests: Iterable[Request]) -> None:
        """Take new requests; the front has checked that each can be served."""
        for request in requests:
            self.requests[request.request_id] = request
            self._waiting.append(request)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Forget requests and free their blocks; ids that are not here any more are passed over."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is None:
                continue
            if request in self._waiting:
                self._waiting.remove(request)
            self._release(request)

    def next_batch(self) -> Batch:
        """The requests of the next step; empty if there is nothing to do."""
        self._admit()
        return Batch(rank=self._rank, requests=tuple(_next_slice(request) for request in self._running))

    def commit(self, batch: Batch, sampled: Sampled) -> list[TokenOutput]:
        """Write the new tokens down, end what is finished, and free its blocks."""
        outputs = []
        for place, part in enumerate(batch.requests):
            request = self.requests[part.request_id]
            request.num_computed += part.query_len
            token = sampled.tokens[place]
            request.output_ids.append(token.token_id)
            finish_reason, stop_reason = self._finish_reason(request, token.token_id)
            outputs.append(
                TokenOutput(
                    request_id=request.request_id,
                    token=token,
                    finish_reason=finish_reason,
                    stop_reason=stop_reason,
                    prompt=sampled.prompt.get(place),
                    num_cached=request.num_cached,
                )
            )
            if finish_reason is not None:
                self._release(request)
        return outputs

    def _admit(self) -> None:
        budget = self._max_num_batched_tokens - len(self._running)
        while self._waiting and len(self._running) < self._max_num_seqs:
            request = self._waiting[0]
            if len(request.prompt_ids) > budget:
                return
            blocks = self.pool.take(request.most_tokens)
            if blocks is None:
                return
            request.block_ids = blocks
            budget -= len(request.prompt_ids)
            self._running.append(self._waiting.popleft())

    def _finish_reason(self, request: Request, token_id: int) -> tuple[str | None, int | None]:
        """And the token of stop_token_ids, if that is why."""
        params = request.params
        if len(request.output_ids) >= params.min_tokens:
            if token_id in self._eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token_id in (params.stop_token_ids or ()):
                return "stop", token_id
        return ("length" if len(request.output_ids) >= request.max_tokens else None), None

    def _release(self, request: Request) -> None:
        del self.requests[request.request_id]
        if request in self._running:
            self._running.remove(request)
        self.pool.give_back(request.block_ids)
        request.block_ids = ()


def _next_slice(request: Request) -> RequestSlice:
    """The tokens of the request that are not computed yet: the whole prompt, or the last token."""
    all_ids = request.prompt_ids if not request.output_ids else (request.output_ids[-1],)
    return RequestSlice(
        request_id=request.request_id,
        token_ids=all_ids,
        context_len=request.num_computed,
        block_ids=request.block_ids,
    )
