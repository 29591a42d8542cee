"""The scheduler of one rank: which requests run when, with how many tokens, and what their blocks hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from antiphon.core.batch import PENDING_TOKEN, Batch
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.cache.block_pool import BlockPool, block_key
from antiphon.engine.scheduling.request import NewToken, PromptPart, Request, Sampled, TokenOutput
from antiphon.engine.scheduling.scheduler import Scheduler

EOS = 2
WORD = 7


def make_scheduler(
    *,
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    prefix_caching: bool = True,
    chunked_prefill: bool = True,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, block_size, prefix_caching=prefix_caching),
        rank=3,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        eos_token_ids=(EOS, EOS + 1),
        chunked_prefill=chunked_prefill,
    )


def make_request(number: int, prompt: int | Sequence[int], max_tokens: int = 4, **params: object) -> Request:
    """prompt: token ids, or how many; then no two requests have one in common."""
    ids = range(1000 * number, 1000 * number + prompt) if isinstance(prompt, int) else prompt
    return Request(
        request_id=number,
        prompt_ids=tuple(ids),
        params=ResolvedParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        max_tokens=max_tokens,
        seed=number,
    )


def ids_of(batch: Batch) -> list[int]:
    return [part.request_id for part in batch.requests]


def ends_text(scheduler: Scheduler, batch: Batch) -> list[int]:
    """Places of the slices after which a token is sampled."""
    return [
        place
        for place, part in enumerate(batch.requests)
        if part.context_len + part.query_len == scheduler.requests[part.request_id].num_tokens
    ]


def commit(scheduler: Scheduler, batch: Batch, tokens: Iterable[int] | int = WORD) -> list[TokenOutput]:
    """tokens: one for every slice, used where one is sampled."""
    each = [tokens] * len(batch.requests) if isinstance(tokens, int) else list(tokens)
    chosen = {place: NewToken(token_id=each[place]) for place in ends_text(scheduler, batch)}
    return launch_and_commit(scheduler, batch, Sampled(tokens=chosen))


def launch_and_commit(scheduler: Scheduler, batch: Batch, sampled: Sampled) -> list[TokenOutput]:
    scheduler.launched(batch)
    return scheduler.commit(batch, sampled)


def step(scheduler: Scheduler, tokens: Iterable[int] | int = WORD) -> list[TokenOutput]:
    return commit(scheduler, scheduler.next_batch(), tokens)


def run(scheduler: Scheduler, *, limit: int = 200) -> list[Batch]:
    """Step until all requests have ended. Returns the batches."""
    batches = []
    while scheduler.num_unfinished:
        batches.append(scheduler.next_batch())
        commit(scheduler, batches[-1])
        assert len(batches) < limit, "it never ends"
    return batches


# ---- admission


def test_nothing_to_do() -> None:
    batch = make_scheduler().next_batch()
    assert (batch.rank, batch.requests, batch.num_tokens) == (3, (), 0)


def test_prompts_come_first_and_whole() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(1, 5), make_request(2, 9)])
    batch = scheduler.next_batch()
    assert ids_of(batch) == [1, 2]
    assert [part.token_ids for part in batch.requests] == [tuple(range(1000, 1005)), tuple(range(2000, 2009))]
    assert [part.context_len for part in batch.requests] == [0, 0]
    assert not batch.decode_only


def test_a_batch_can_be_asked_for_again() -> None:
    """A step does not run as long as a message has reached only some of the ranks."""
    scheduler = make_scheduler(max_num_batched_tokens=20)
    scheduler.add([make_request(number, 8) for number in range(4)])
    assert scheduler.next_batch() == scheduler.next_batch()
    step(scheduler)
    assert scheduler.next_batch() == scheduler.next_batch()


def test_sequences_of_a_step_are_limited() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add([make_request(number, 1, max_tokens=2) for number in range(5)])
    assert [ids_of(batch) for batch in run(scheduler)] == [[0, 1], [0, 1], [2, 3], [2, 3], [4], [4]]


def test_what_the_sampler_keeps_goes_with_the_request() -> None:
    """The caller may keep a request: `LLM.generate` does, for all prompts of a call."""
    scheduler = make_scheduler()
    requests = [make_request(number, 3, max_tokens=1 + number) for number in range(2)]
    for request in requests:
        request.sampling = object()
    scheduler.add(requests)
    step(scheduler)
    assert requests[0].sampling is None and requests[1].sampling is not None
    scheduler.abort([1])
    assert requests[1].sampling is None


def test_a_request_that_waits_is_not_looked_at_anew_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    def counted(previous: bytes, token_ids: Sequence[int]) -> bytes:
        keys.append(block_key(previous, token_ids))
        return keys[-1]

    scheduler = make_scheduler(num_blocks=1 + 24, max_num_batched_tokens=96)
    text = range(40)
    scheduler.add([make_request(0, text, max_tokens=1)])
    step(scheduler)  # its ten blocks are known now
    scheduler.add([make_request(1, 80, max_tokens=12)])
    step(scheduler)
    monkeypatch.setattr("antiphon.engine.scheduling.scheduler.block_key", counted)
    scheduler.add([make_request(2, text, max_tokens=1)])
    for _ in range(3):
        assert ids_of(scheduler.next_batch()) == [1]
        step(scheduler)
    assert 0 < len(keys) == len(set(keys))
    scheduler.abort([1])
    assert [part.context_len for part in scheduler.next_batch().requests] == [12], "what is left of its blocks"


def test_no_more_requests_run_than_can_decode_in_one_step() -> None:
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=3)
    scheduler.add([make_request(number, 1, max_tokens=3) for number in range(5)])
    assert [ids_of(batch) for batch in run(scheduler)] == [[0, 1, 2]] * 3 + [[3, 4]] * 3


def test_no_request_overtakes_another() -> None:
    """A small request waits behind a large one for which there are no blocks."""
    scheduler = make_scheduler(num_blocks=1 + 4)
    scheduler.add([make_request(0, 8), make_request(1, 12, max_tokens=1), make_request(2, 1, max_tokens=1)])
    assert ids_of(scheduler.next_batch()) == [0]


def test_one_ends_and_the_next_takes_its_place() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add([make_request(number, 3) for number in range(3)])
    step(scheduler, [EOS, WORD])
    batch = scheduler.next_batch()
    assert (ids_of(batch), batch.query_lens) == ([1, 2], [1, 3])


# ---- chunks


def test_a_prompt_that_does_not_fit_comes_in_chunks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add([make_request(0, 24, max_tokens=2)])
    seen = []
    while scheduler.num_unfinished:
        batch = scheduler.next_batch()
        (part,) = batch.requests
        seen.append((part.context_len, part.query_len, len(part.block_ids)))  # blocks as they are needed
        commit(scheduler, batch)
    assert seen == [(0, 10, 3), (10, 10, 5), (20, 4, 6), (24, 1, 7)]


def test_requests_decode_beside_the_chunks_of_a_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add([make_request(0, 4, max_tokens=9), make_request(1, 5, max_tokens=9)])
    step(scheduler)
    scheduler.add([make_request(2, 20, max_tokens=2), make_request(3, 3, max_tokens=2)])
    second, third, fourth = run(scheduler)[:3]
    assert (ids_of(second), second.query_lens) == ([0, 1, 2], [1, 1, 8])
    assert (ids_of(third), third.query_lens) == ([0, 1, 2], [1, 1, 8])
    assert (ids_of(fourth), fourth.query_lens) == ([0, 1, 2, 3], [1, 1, 4, 3]), "the next prompt fills the step up"


def test_a_chunk_that_ends_no_text_gives_no_token() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add([make_request(0, 14, max_tokens=1)])
    assert step(scheduler) == []
    (output,) = step(scheduler)
    assert output.token == NewToken(token_id=WORD)
    assert output.finish_reason == "length"


def test_without_chunks_a_prompt_waits_until_it_fits() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20, chunked_prefill=False)
    scheduler.add([make_request(0, 8), make_request(1, 8), make_request(2, 19)])
    assert [batch.query_lens for batch in run(scheduler)] == [[8, 8], [1, 1], [1, 1], [1, 1], [19], [1], [1], [1]]


# ---- prefix cache


def test_a_prompt_finds_what_another_one_has_computed() -> None:
    scheduler = make_scheduler()
    text = list(range(50, 70))
    scheduler.add([make_request(0, text)])
    first = scheduler.next_batch()
    commit(scheduler, first)
    scheduler.add([make_request(1, [*text[:11], 1, 2])])
    batch = scheduler.next_batch()
    part = batch.requests[1]
    assert (part.context_len, part.token_ids) == (8, (58, 59, 60, 1, 2)), "full blocks only"
    assert part.block_ids[:2] == first.requests[0].block_ids[:2]
    assert not set(part.block_ids[2:]) & set(first.requests[0].block_ids)
    (_, output) = commit(scheduler, batch)
    assert output.num_cached == 8
    assert scheduler.stats.to_dict()["prefix_cache"] == {"admitted_tokens": 33, "hit_tokens": 8}


def test_hits_appear_when_a_step_commits() -> None:
    """Two equal prompts in one step are both computed, because neither may read what the other is writing."""
    scheduler = make_scheduler()
    text = list(range(50, 70))
    scheduler.add([make_request(0, text), make_request(1, text)])
    batch = scheduler.next_batch()
    assert [part.context_len for part in batch.requests] == [0, 0]
    assert not set(batch.requests[0].block_ids) & set(batch.requests[1].block_ids)
    commit(scheduler, batch)
    scheduler.add([make_request(2, text)])
    assert scheduler.next_batch().requests[2].context_len == 16


def test_the_last_token_is_always_computed() -> None:
    scheduler = make_scheduler()
    text = list(range(50, 66))
    scheduler.add([make_request(0, text, max_tokens=1)])
    step(scheduler)
    scheduler.add([make_request(1, text)])
    (part,) = scheduler.next_batch().requests
    assert (part.context_len, part.query_len) == (12, 4)


def test_generated_tokens_are_found_too() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(0, list(range(50, 57)), max_tokens=6)])
    run(scheduler)
    scheduler.add([make_request(1, [*range(50, 57), *[WORD] * 6, 1])])
    (part,) = scheduler.next_batch().requests
    assert part.context_len == 12


def test_nothing_is_found_without_prefix_caching() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    for number in range(2):
        scheduler.add([make_request(number, list(range(50, 70)), max_tokens=1)])
        (part,) = scheduler.next_batch().requests
        assert part.context_len == 0
        commit(scheduler, scheduler.next_batch())


def test_a_request_for_prompt_logits_computes_its_whole_prompt() -> None:
    scheduler = make_scheduler()
    text = list(range(50, 70))
    scheduler.add([make_request(0, text, max_tokens=1)])
    step(scheduler)
    scheduler.add([make_request(1, text, return_prompt_logits=True), make_request(2, text, prompt_logprobs=1)])
    assert [part.context_len for part in scheduler.next_batch().requests] == [0, 0]


# ---- preemption


def test_the_last_to_arrive_gives_its_blocks_to_the_first() -> None:
    scheduler = make_scheduler(num_blocks=1 + 5, prefix_caching=False)
    scheduler.add([make_request(0, 7, max_tokens=6), make_request(1, 8, max_tokens=6)])
    batches = run(scheduler)
    assert [ids_of(batch) for batch in batches[:3]] == [[0, 1], [0, 1], [0]], "request 0 needs a third block"
    again = next(batch for batch in batches[3:] if 1 in ids_of(batch))
    assert again.requests[-1].token_ids == (*range(1000, 1008), WORD, WORD), "prompt and output as one prefill"
    assert again.requests[-1].context_len == 0
    assert scheduler.stats.preemptions == 1
    assert scheduler.pool.num_free == scheduler.pool.num_usable


def test_the_last_to_arrive_preempts_itself() -> None:
    scheduler = make_scheduler(num_blocks=1 + 5, prefix_caching=False)
    scheduler.add([make_request(0, 8, max_tokens=6), make_request(1, 7, max_tokens=6)])
    batches = run(scheduler)
    assert [ids_of(batch) for batch in batches[:3]] == [[0, 1], [0, 1], [0]], "request 1 needs a third block"
    assert scheduler.stats.preemptions == 1


def test_a_preempted_request_finds_its_blocks_that_were_not_taken() -> None:
    scheduler = make_scheduler(num_blocks=1 + 6)
    scheduler.add([make_request(0, 7, max_tokens=9), make_request(1, 12, max_tokens=6)])
    batches = run(scheduler)
    again = next(batch for batch in batches[3:] if 1 in ids_of(batch))
    assert again.requests[-1].context_len == 8, "of its three full blocks request 0 took the last"
    assert scheduler.stats.preemptions == 1


def test_a_preempted_request_does_not_run_in_that_step_and_none_is_admitted() -> None:
    scheduler = make_scheduler(num_blocks=1 + 5, prefix_caching=False)
    scheduler.add([make_request(0, 7, max_tokens=9), make_request(1, 8, max_tokens=9), make_request(2, 1)])
    while scheduler.stats.preemptions == 0:
        batch = scheduler.next_batch()
        assert 2 not in ids_of(batch)
        commit(scheduler, batch)
    assert ids_of(batch) == [0]


def test_alone_a_request_may_have_the_whole_cache() -> None:
    scheduler = make_scheduler(num_blocks=1 + 3)
    scheduler.add([make_request(0, 5, max_tokens=8), make_request(1, 5, max_tokens=8)])
    run(scheduler)
    assert scheduler.pool.num_free == 3


# ---- decode and ends


def test_decode_continues_with_the_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(1, 5, max_tokens=3)])
    step(scheduler, 70)
    batch = scheduler.next_batch()
    assert batch.decode_only
    assert (batch.requests[0].token_ids, batch.requests[0].context_len) == ((70,), 5)
    commit(scheduler, batch, 71)
    part = scheduler.next_batch().requests[0]
    assert (part.token_ids, part.context_len) == ((71,), 6)


@pytest.mark.parametrize(
    ("tokens", "params", "reasons"),
    [
        ([WORD, WORD, WORD], {}, [None, None, "length"]),
        ([WORD, EOS], {}, [None, "stop"]),
        ([EOS + 1], {}, ["stop"]),
        ([WORD, WORD, EOS], {}, [None, None, "stop"]),
        ([EOS, EOS, WORD], {"ignore_eos": True}, [None, None, "length"]),
        ([WORD, WORD, EOS], {"ignore_eos": True}, [None, None, "length"]),
        ([WORD, 9], {"stop_token_ids": [8, 9]}, [None, "stop"]),
        ([EOS, 9], {"stop_token_ids": [8, 9], "ignore_eos": True}, [None, "stop"]),
        ([EOS, 9, WORD], {"stop_token_ids": [9], "min_tokens": 2}, [None, None, "length"]),
        ([WORD, WORD, 9], {"stop_token_ids": [9], "min_tokens": 2}, [None, None, "stop"]),
    ],
)
def test_finish_reasons(tokens: list[int], params: dict[str, object], reasons: list[str | None]) -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(1, 3, max_tokens=3, **params)])
    outputs = [output for token in tokens for output in step(scheduler, token)]
    assert [output.token and output.token.token_id for output in outputs] == tokens
    assert [output.finish_reason for output in outputs] == reasons
    assert [output.stop_reason for output in outputs[:-1]] == [None] * (len(tokens) - 1)
    assert outputs[-1].stop_reason == (9 if tokens[-1] == 9 else None)
    assert scheduler.num_unfinished == 0
    assert scheduler.requests == {}
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    assert scheduler.next_batch().requests == ()


def test_sampled_tokens_go_to_the_request_at_their_place() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(5, 2), make_request(6, 2)])
    token, prompt = NewToken(token_id=11, logits=b"logits"), PromptPart(logits=b"prompt")
    sampled = Sampled(tokens={0: NewToken(token_id=10), 1: token}, prompt={0: prompt})
    first, second = launch_and_commit(scheduler, scheduler.next_batch(), sampled)
    assert (first.request_id, first.token, first.prompt) == (5, NewToken(token_id=10), prompt)
    assert (second.request_id, second.token, second.prompt) == (6, token, None)


def test_a_chunk_can_bring_a_part_of_the_prompts_logprobs() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add([make_request(5, 14, prompt_logprobs=1)])
    part = PromptPart(logits=b"first")
    (output,) = launch_and_commit(scheduler, scheduler.next_batch(), Sampled(prompt={0: part}))
    assert (output.token, output.prompt, output.finish_reason) == (None, part, None)


# ---- abort


def test_abort_of_waiting_running_and_unknown_requests() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add([make_request(number, 3) for number in range(4)])
    step(scheduler)
    free = scheduler.pool.num_free
    scheduler.abort([2, 0, 99])
    assert scheduler.num_unfinished == 2
    assert scheduler.pool.num_free > free
    assert ids_of(scheduler.next_batch()) == [1, 3]
    scheduler.abort([1, 3, 1])
    assert scheduler.num_unfinished == 0
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    assert scheduler.next_batch().requests == ()


def test_an_aborted_request_makes_room() -> None:
    scheduler = make_scheduler(num_blocks=1 + 2)
    scheduler.add([make_request(0, 5), make_request(1, 5)])
    assert ids_of(scheduler.next_batch()) == [0]
    scheduler.abort([0])
    assert ids_of(scheduler.next_batch()) == [1]


# ---- any order of events

_SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 12), st.integers(0, 2), st.booleans())


# ---- a step launched before the one before is committed


def test_a_request_goes_on_with_a_pending_token() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(0, 6, 3)])
    first = scheduler.next_batch()
    scheduler.launched(first)
    second = scheduler.next_batch()
    (part,) = second.requests
    assert (part.token_ids, part.context_len) == ((PENDING_TOKEN,), 6)
    scheduler.launched(second)
    (output,) = scheduler.commit(first, Sampled(tokens={0: NewToken(token_id=7)}))
    assert (output.request_id, output.finish_reason) == (0, None)
    third = scheduler.next_batch()
    assert third.requests[0].token_ids == (PENDING_TOKEN,)
    scheduler.launched(third)
    scheduler.commit(second, Sampled(tokens={0: NewToken(token_id=8)}))
    assert scheduler.next_batch().requests == (), "its last token is on its way"
    (output,) = scheduler.commit(third, Sampled(tokens={0: NewToken(token_id=9)}))
    assert output.finish_reason == "length" and scheduler.num_unfinished == 0


def test_the_token_after_an_end_is_dropped() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(0, 6, 9), make_request(1, 6, 9)])
    first = scheduler.next_batch()
    scheduler.launched(first)
    second = scheduler.next_batch()
    scheduler.launched(second)
    outputs = scheduler.commit(first, Sampled(tokens={0: NewToken(token_id=EOS), 1: NewToken(token_id=WORD)}))
    assert [output.finish_reason for output in outputs] == ["stop", None]
    assert ids_of(scheduler.next_batch()) == [1]
    outputs = scheduler.commit(second, Sampled(tokens={0: NewToken(token_id=WORD), 1: NewToken(token_id=WORD)}))
    assert [output.request_id for output in outputs] == [1]


def test_blocks_with_pending_tokens_are_not_known() -> None:
    scheduler = make_scheduler()
    size = scheduler.pool.block_size
    scheduler.add([make_request(0, size - 1, 9)])
    first = scheduler.next_batch()
    scheduler.launched(first)
    second = scheduler.next_batch()
    scheduler.launched(second)
    request = scheduler.requests[0]
    assert request.num_computed == size and not request.keys, "the block is full, but its last token is not known"
    scheduler.commit(first, Sampled(tokens={0: NewToken(token_id=WORD)}))
    assert len(request.keys) == 1


class AnyOrder(RuleBasedStateMachine):
    """Adds, aborts and steps at random, over a cache that remembers what is written to it.

    A step may be launched before the one before is committed. After each event every block is held or free. Every slice
    finds its own text in its blocks. In the end all requests are served.
    """

    @initialize(
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(5, 40),
        spare=st.integers(0, 12),
        prefix_caching=st.booleans(),
        chunked_prefill=st.booleans(),
    )
    def begin(
        self, max_num_seqs: int, max_num_batched_tokens: int, spare: int, prefix_caching: bool, chunked_prefill: bool
    ) -> None:
        most_blocks = 9  # 24 + 12 - 1 tokens in blocks of 4
        self.limits = (max_num_seqs, max_num_batched_tokens)
        self.scheduler = make_scheduler(
            num_blocks=1 + most_blocks + spare,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_caching=prefix_caching,
            chunked_prefill=chunked_prefill,
        )
        self.by_id: dict[int, Request] = {}
        self.arrived: list[int] = []  # not ended, in order of arrival
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, offset): the text up to the token there
        self.in_flight: tuple[Batch, dict[int, int]] | None = None  # with the token that each place will get
        self.coming: dict[int, int] = {}  # request: the token that it will get from the step in flight

    @rule(shapes=st.lists(_SHAPES, min_size=1, max_size=4))
    def add(self, shapes: list[tuple[int, int, int, bool]]) -> None:
        start = len(self.by_id)
        requests = [
            # One of three texts, so that many have beginnings in common.
            make_request(number, [100 * kind] * prompt_len, max_tokens, ignore_eos=ignore_eos)
            for number, (prompt_len, max_tokens, kind, ignore_eos) in enumerate(shapes, start=start)
        ]
        self.scheduler.add(requests)
        self.by_id |= {request.request_id: request for request in requests}
        self.arrived += [request.request_id for request in requests]

    @precondition(lambda self: self.by_id)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.by_id)), max_size=3))
        self.scheduler.abort(ids)
        self.arrived = [number for number in self.arrived if number not in ids]

    @rule(
        tokens=st.lists(st.sampled_from([WORD, WORD, WORD, EOS]), min_size=5, max_size=5),
        again=st.booleans(),
        waits=st.booleans(),
    )
    def step(self, tokens: list[int], again: bool, waits: bool) -> None:
        batch = self.scheduler.next_batch()
        if again:
            batch = self.scheduler.next_batch()
        if not batch.requests and self.in_flight is not None:
            self._commit(*self.in_flight)
            self.in_flight, self.coming = None, {}
            batch = self.scheduler.next_batch()
        self._check_batch(batch)
        self._compute(batch)
        chosen = {place: tokens[place] for place in ends_text(self.scheduler, batch)}
        self.scheduler.launched(batch)
        before, self.in_flight = self.in_flight, (batch, chosen)
        self.coming = {batch.requests[place].request_id: token for place, token in chosen.items()}
        if before is not None:
            self._commit(*before)
        if waits:
            self._commit(batch, chosen)
            self.in_flight, self.coming = None, {}

    def _commit(self, batch: Batch, chosen: dict[int, int]) -> None:
        tokens = {place: NewToken(token_id=token) for place, token in chosen.items()}
        sampling = [batch.requests[place].request_id for place in chosen]
        outputs = self.scheduler.commit(batch, Sampled(tokens=tokens))
        assert [output.request_id for output in outputs] == [number for number in sampling if number in self.arrived]
        for output in outputs:
            request = self.by_id[output.request_id]
            stopped = request.output_ids[-1] == EOS and not request.params.ignore_eos
            expected = "stop" if stopped else "length" if len(request.output_ids) == request.max_tokens else None
            assert output.finish_reason == expected
            if expected is not None:
                self.arrived.remove(output.request_id)

    def _check_batch(self, batch: Batch) -> None:
        max_num_seqs, max_num_batched_tokens = self.limits
        assert len(batch.requests) <= max_num_seqs
        assert batch.num_tokens <= max_num_batched_tokens
        assert batch.requests or not self.arrived, "nothing runs though requests wait"
        running = [number for number in self.arrived if self.by_id[number].block_ids]
        assert running == self.arrived[: len(running)], "a request overtook another"
        assert set(ids_of(batch)) <= set(running)
        goes_on = [number for number in self.arrived if self.by_id[number].num_missing]
        assert not goes_on or goes_on[0] in ids_of(batch), "the first to arrive must go on"
        for part in batch.requests:
            request = self.by_id[part.request_id]
            stop = part.context_len + part.query_len
            assert part.query_len > 0
            known = (*request.prompt_ids, *request.output_ids, *[PENDING_TOKEN] * request.num_pending)
            assert known[part.context_len : stop] == part.token_ids
            assert len(part.block_ids) * self.scheduler.pool.block_size >= stop

    def _compute(self, batch: Batch) -> None:
        """Every slice reads what was there before the step, and writes into its own blocks."""
        size, written = self.scheduler.pool.block_size, {}
        for part in batch.requests:
            request = self.by_id[part.request_id]
            text = (*request.prompt_ids, *request.output_ids)
            if request.num_pending:
                text += (self.coming[part.request_id],)
            for position in range(part.context_len):
                place = (part.block_ids[position // size], position % size)
                assert self.cache.get(place) == text[: position + 1], f"request {part.request_id} reads another's text"
            for position in range(part.context_len, part.context_len + part.query_len):
                place = (part.block_ids[position // size], position % size)
                assert place not in written, "two requests write to one place"
                written[place] = text[: position + 1]
        self.cache |= written

    @invariant()
    def every_block_is_held_or_free(self) -> None:
        pool = self.scheduler.pool
        held = [block for number in self.arrived for block in self.by_id[number].block_ids]
        assert 0 not in held
        assert len(set(held)) + pool.num_free == pool.num_usable
        assert self.scheduler.num_unfinished == len(self.arrived)
        for number in self.arrived:
            assert len(set(self.by_id[number].block_ids)) == len(self.by_id[number].block_ids)

    def teardown(self) -> None:
        for _ in range(40 * len(getattr(self, "arrived", ()))):
            if self.arrived:
                self.step([WORD] * 5, again=False, waits=False)
        assert not getattr(self, "arrived", ())
        if hasattr(self, "scheduler"):
            assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable


AnyOrder.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to shrink a failure would take minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestAnyOrder = AnyOrder.TestCase
