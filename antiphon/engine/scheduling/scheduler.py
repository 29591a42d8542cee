"""Continuous batching: what to run next on one rank, and what to do with the result.

A step is filled first with requests that decode, then with prompts under way, then with waiting requests, each group
in order of arrival. A prompt that does not fit is computed in chunks, so a step can hold decodes, chunks and whole
prompts. KV blocks are taken when tokens need them. When no block is left, the request that arrived last is preempted:
it gives its blocks back and waits at the head of the queue, to be computed again. The request that arrived first can
always go on, so every request ends.

    waiting ──admit──► running ──commit──► finished
       ▲                  │
       └──── preempt ─────┘

A step may be prepared while the one before still runs: `launched` records what a step will compute, and `commit` what
it has found. In between, its new tokens are pending. A request that turns out to have ended has run one token too many,
which is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain

from antiphon.core.batch import Batch, RequestSlice
from antiphon.engine.cache.block_pool import BlockPool, block_key
from antiphon.engine.scheduling.request import NewToken, Request, Sampled, TokenOutput
from antiphon.engine.stats import SchedulerStats


class Scheduler:
    """Owns the requests of one rank.

    chunked_prefill: whether a prompt that would fit into one step may start in a step that has no room for all of it.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        rank: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: tuple[int, ...],
        chunked_prefill: bool = True,
    ) -> None:
        self.pool = pool
        self.requests: dict[int, Request] = {}
        self.stats = SchedulerStats()
        self._rank = rank
        self._max_running = min(max_num_seqs, max_num_batched_tokens)  # so that all of them can decode in one step
        self._max_num_batched_tokens = max_num_batched_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._chunked_prefill = chunked_prefill
        # Both in order of arrival; all that run have arrived before any that waits.
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, requests: Iterable[Request]) -> None:
        """Queue new requests. The frontend has checked that each fits into the cache when it runs alone."""
        for request in requests:
            self.requests[request.request_id] = request
            self._waiting.append(request)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Drop requests and free their blocks; unknown ids are ignored."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                self._release(request)

    def next_batch(self) -> Batch:
        """Return the tokens of the next step; empty if nothing can run now. May be called again before `launched`."""
        step = _Step(self._max_num_batched_tokens)
        num_preempted = self.stats.preemptions
        decoding = [request for request in self._running if request.num_missing == 1]
        prefilling = [request for request in self._running if request.num_missing > 1]
        for request in chain(decoding, prefilling):
            if request.block_ids:  # else it was preempted for an earlier one
                self._continue(request, step)
        if self.stats.preemptions == num_preempted:
            self._admit(step)
        return Batch(rank=self._rank, requests=tuple(step.slices.values()))

    def launched(self, batch: Batch) -> None:
        """Record that the step of `batch` has been launched: later steps run after it and may read what it writes."""
        for part in batch.requests:
            request = self.requests[part.request_id]
            request.num_computed = part.context_len + part.query_len
            request.num_pending += request.num_computed == request.num_tokens
            self._publish(request)

    def commit(self, batch: Batch, sampled: Sampled) -> list[TokenOutput]:
        """Record what a launched step has sampled, and release finished requests with their blocks.

        Results of requests that have ended or were aborted since the launch are dropped.
        """
        outputs = []
        for place, part in enumerate(batch.requests):
            request = self.requests.get(part.request_id)
            token, prompt = sampled.tokens.get(place), sampled.prompt.get(place)
            if request is None or (token is None and prompt is None):
                continue
            finish_reason, stop_reason = (None, None) if token is None else self._append(request, token)
            self._publish(request)
            outputs.append(
                TokenOutput(
                    request_id=request.request_id,
                    token=token,
                    finish_reason=finish_reason,
                    stop_reason=stop_reason,
                    prompt=prompt,
                    num_cached=request.num_cached,
                )
            )
            if finish_reason is not None:
                self._release(request)
        return outputs

    # ---- what a step runs

    def _continue(self, request: Request, step: _Step) -> None:
        """Add a running request to the step, and take the blocks it needs, preempting later requests if necessary."""
        while count := min(request.num_missing, step.room):
            needed = self.pool.blocks_for(request.num_computed + count) - len(request.block_ids)
            blocks = self.pool.take(max(0, needed))
            if blocks is not None:
                request.block_ids.extend(blocks)
                step.add(request, count)
                return
            victim = self._running[-1]
            self._preempt(victim)
            step.drop(victim)
            if victim is request:
                return

    def _admit(self, step: _Step) -> None:
        """Start waiting requests, in order of arrival, as long as there are tokens and blocks for them.

        One free block is left for each running request, which lasts until all of them have filled one more.
        """
        while self._waiting and step.room and len(self._running) < self._max_running:
            request = self._waiting[0]
            keys = self._known_keys(request)
            shared = self.pool.find(keys)
            num_shared = len(shared) * self.pool.block_size
            count = self._first_chunk(request.num_tokens - num_shared, step)
            needed = self.pool.blocks_for(num_shared + count) - len(shared)
            if not count or needed + len(self._running) > self.pool.num_free_beside(shared):
                return
            self.pool.hold(shared)
            blocks = self.pool.take(needed)
            assert blocks is not None
            request.block_ids, request.keys = [*shared, *blocks], keys[: len(shared)]
            request.num_computed = num_shared
            if not request.num_preemptions:
                request.num_cached = num_shared
            self.stats.admitted_tokens += request.num_tokens
            self.stats.hit_tokens += num_shared
            request.known_keys = []
            self._running.append(self._waiting.popleft())
            step.add(request, count)

    def _first_chunk(self, num_missing: int, step: _Step) -> int:
        """How many tokens of a waiting request this step can take; 0 if it should wait for a step with more room."""
        fits_later = step.room < num_missing <= self._max_num_batched_tokens
        return 0 if fits_later and not self._chunked_prefill else min(num_missing, step.room)

    def _preempt(self, request: Request) -> None:
        """Take the blocks of a running request. It reuses those still in the prefix cache when it is admitted again."""
        self._running.remove(request)
        self._waiting.appendleft(request)
        self._give_back(request)
        request.num_computed = 0
        request.sampling = None  # the sampler rebuilds it
        request.num_preemptions += 1
        self.stats.preemptions += 1

    # ---- the prefix cache

    def _known_keys(self, request: Request) -> list[bytes]:
        """Return the keys of full blocks to look up in the prefix cache, up to the first that is missing.

        The block of the last token is left out: that token must be computed, because the next one follows from it.
        """
        if request.must_compute_prompt:
            return []
        keys, size = request.known_keys, self.pool.block_size
        num_full = (request.num_tokens - 1) // size
        for number in range(num_full):
            if number == len(keys):
                keys.append(self._key(request, number * size, keys))
            if not self.pool.find(keys[number : number + 1]):
                return keys[: number + 1]
        return keys[:num_full]

    def _publish(self, request: Request) -> None:
        """Put the blocks that launched steps fill with known tokens into the prefix cache."""
        size = self.pool.block_size
        for number in range(len(request.keys), min(request.num_computed, request.num_known) // size):
            key = self._key(request, number * size, request.keys)
            request.keys.append(key)
            self.pool.publish(request.block_ids[number], key)

    def _key(self, request: Request, start: int, keys: list[bytes]) -> bytes:
        return block_key(keys[-1] if keys else b"", request.tokens(start, start + self.pool.block_size))

    # ---- ends

    def _append(self, request: Request, token: NewToken) -> tuple[str | None, int | str | None]:
        """Add a new token. Returns the finish and stop reasons; both are `None` if the text goes on."""
        request.output_ids.append(token.token_id)
        request.num_pending -= 1
        params, num_outputs = request.params, len(request.output_ids)
        if num_outputs > params.min_tokens:
            if token.token_id in self._eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token.token_id in (params.stop_token_ids or ()):
                return "stop", token.token_id
        return ("length", None) if num_outputs >= request.max_tokens else (None, None)

    def _release(self, request: Request) -> None:
        del self.requests[request.request_id]
        if request in self._running:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        self._give_back(request)
        request.sampling, request.known_keys = None, []  # the caller may still hold the request

    def _give_back(self, request: Request) -> None:
        self.pool.give_back(request.block_ids)
        request.block_ids, request.keys = [], []


class _Step:
    """The next step while it is being filled."""

    def __init__(self, room: int) -> None:
        self.room = room  # tokens that may still be added
        self.slices: dict[int, RequestSlice] = {}

    def add(self, request: Request, count: int) -> None:
        """Add the next `count` tokens of the request."""
        start = request.num_computed
        self.slices[request.request_id] = RequestSlice(
            request_id=request.request_id,
            token_ids=request.tokens(start, start + count),
            context_len=start,
            block_ids=request.block_ids,
        )
        self.room -= count

    def drop(self, request: Request) -> None:
        part = self.slices.pop(request.request_id, None)
        self.room += 0 if part is None else part.query_len
