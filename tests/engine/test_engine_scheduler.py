"""The scheduler of one rank: who is admitted when, what a step runs, and that every block comes back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from antiphon.core.batch import Batch
from antiphon.core.sampling import SamplingParams
from antiphon.engine.kv_cache import BlockPool
from antiphon.engine.request import Request, TokenOutput
from antiphon.engine.sampler import Sampled
from antiphon.engine.scheduler import Scheduler

EOS = 2
WORD = 7


def make_scheduler(
    *, num_blocks: int = 100, block_size: int = 4, max_num_seqs: int = 8, max_num_batched_tokens: int = 64
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, block_size),
        rank=3,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        eos_token_ids=(EOS, EOS + 1),
    )


def make_request(number: int, prompt_len: int, max_tokens: int = 4, *, ignore_eos: bool = False) -> Request:
    return Request(
        request_id=number,
        prompt_ids=tuple(range(1000 * number, 1000 * number + prompt_len)),
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
        max_tokens=max_tokens,
        seed=number,
    )


def ids_of(batch: Batch) -> list[int]:
    return [part.request_id for part in batch.requests]


def commit(scheduler: Scheduler, batch: Batch, tokens: Sequence[int] | int = WORD) -> list[TokenOutput]:
    token_ids = [tokens] * len(batch.requests) if isinstance(tokens, int) else list(tokens)
    return scheduler.commit(batch, Sampled(token_ids=token_ids))


def step(scheduler: Scheduler, tokens: Sequence[int] | int = WORD) -> list[TokenOutput]:
    return commit(scheduler, scheduler.next_batch(), tokens)


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


def test_tokens_of_a_step_are_limited() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20)
    scheduler.add([make_request(number, 8) for number in range(4)])
    first = scheduler.next_batch()
    assert ids_of(first) == [0, 1]
    commit(scheduler, first)
    second = scheduler.next_batch()
    assert ids_of(second) == [0, 1, 2, 3]
    assert second.query_lens == [1, 1, 8, 8]


def test_running_requests_take_part_of_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20)
    scheduler.add([make_request(0, 8), make_request(1, 8), make_request(2, 19)])
    step(scheduler)
    assert ids_of(scheduler.next_batch()) == [0, 1], "1 + 1 + 19 tokens are too many"


def test_sequences_of_a_step_are_limited() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add([make_request(number, 1, max_tokens=2) for number in range(5)])
    seen = []
    while scheduler.num_unfinished:
        batch = scheduler.next_batch()
        seen.append(ids_of(batch))
        commit(scheduler, batch)
    assert seen == [[0, 1], [0, 1], [2, 3], [2, 3], [4], [4]]


def test_blocks_are_enough_for_the_longest_text() -> None:
    """7 prompt tokens and 6 new ones of which the last is never computed: 12 tokens, 3 blocks of 4."""
    scheduler = make_scheduler(num_blocks=1 + 6)
    scheduler.add([make_request(number, 7, max_tokens=6) for number in range(3)])
    batch = scheduler.next_batch()
    assert ids_of(batch) == [0, 1]
    assert [len(part.block_ids) for part in batch.requests] == [3, 3]
    assert scheduler.pool.num_free == 0
    for _ in range(5):
        commit(scheduler, batch)
        batch = scheduler.next_batch()
    assert ids_of(batch) == [0, 1]
    assert batch.requests[0].context_len + batch.requests[0].query_len == 12
    commit(scheduler, batch)
    assert ids_of(scheduler.next_batch()) == [2]


def test_nobody_overtakes() -> None:
    """A small request waits behind a large one, for blocks as well as for tokens."""
    scheduler = make_scheduler(num_blocks=1 + 4)
    scheduler.add(
        [make_request(0, 8, max_tokens=1), make_request(1, 12, max_tokens=1), make_request(2, 1, max_tokens=1)]
    )
    assert ids_of(scheduler.next_batch()) == [0]
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add([make_request(0, 8), make_request(1, 9), make_request(2, 1)])
    assert ids_of(scheduler.next_batch()) == [0]


def test_a_prompt_as_large_as_the_step_is_served_in_the_end() -> None:
    """Nothing is admitted past it, so the running requests end and leave it the whole step."""
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add([make_request(0, 3, max_tokens=5), make_request(1, 16, max_tokens=1)])
    scheduler.add([make_request(number, 1, max_tokens=1) for number in range(2, 6)])
    finished: list[int] = []
    for _ in range(20):
        finished += [output.request_id for output in step(scheduler) if output.finish_reason]
    assert finished == [0, 1, 2, 3, 4, 5]


# ---- decode and ends


def test_decode_goes_on_with_the_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(1, 5, max_tokens=3)])
    step(scheduler, 70)
    batch = scheduler.next_batch()
    assert batch.decode_only
    assert (batch.requests[0].token_ids, batch.requests[0].context_len) == ((70,), 5)
    commit(scheduler, batch, 71)
    part = scheduler.next_batch().requests[0]
    assert (part.token_ids, part.context_len) == ((71,), 6)


def test_a_request_keeps_its_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(1, 5), make_request(2, 5)])
    blocks = set()
    for _ in range(3):
        batch = scheduler.next_batch()
        blocks.add(tuple(part.block_ids for part in batch.requests))
        commit(scheduler, batch)
    assert len(blocks) == 1


@pytest.mark.parametrize(
    ("tokens", "ignore_eos", "reasons"),
    [
        ([WORD, WORD, WORD], False, [None, None, "length"]),
        ([WORD, EOS], False, [None, "stop"]),
        ([EOS + 1], False, ["stop"]),
        ([WORD, WORD, EOS], False, [None, None, "stop"]),
        ([EOS, EOS, WORD], True, [None, None, "length"]),
        ([WORD, WORD, EOS], True, [None, None, "length"]),
    ],
)
def test_finish_reasons(tokens: list[int], ignore_eos: bool, reasons: list[str | None]) -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(1, 3, max_tokens=3, ignore_eos=ignore_eos)])
    outputs = [output for token in tokens for output in step(scheduler, token)]
    assert [output.token_id for output in outputs] == tokens
    assert [output.finish_reason for output in outputs] == reasons
    assert scheduler.num_unfinished == 0
    assert scheduler.requests == {}
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    assert scheduler.next_batch().requests == ()


def test_logits_go_to_the_request_at_their_place() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request(5, 2), make_request(6, 2)])
    sampled = Sampled(token_ids=[10, 11], logits={1: b"logits"}, prompt_logits={0: b"prompt"})
    first, second = scheduler.commit(scheduler.next_batch(), sampled)
    assert (first.request_id, first.token_id, first.logits, first.prompt_logits) == (5, 10, None, b"prompt")
    assert (second.request_id, second.token_id, second.logits, second.prompt_logits) == (6, 11, b"logits", None)


def test_one_ends_and_the_next_takes_its_place_in_the_same_step() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add([make_request(number, 3) for number in range(3)])
    step(scheduler, [EOS, WORD])
    batch = scheduler.next_batch()
    assert (ids_of(batch), batch.query_lens) == ([1, 2], [1, 3])


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

_SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 12), st.booleans())


class AnyOrder(RuleBasedStateMachine):
    """Adds, aborts and steps at random; the invariants hold after each, and in the end everything is served."""

    @initialize(max_num_seqs=st.integers(1, 5), max_num_batched_tokens=st.integers(24, 40), spare=st.integers(0, 12))
    def begin(self, max_num_seqs: int, max_num_batched_tokens: int, spare: int) -> None:
        most_blocks = 9  # 24 + 12 - 1 tokens in blocks of 4
        self.limits = (max_num_seqs, max_num_batched_tokens)
        self.scheduler = make_scheduler(
            num_blocks=1 + most_blocks + spare,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.by_id: dict[int, Request] = {}
        self.arrived: list[int] = []  # not ended, in order of arrival
        self.outputs: dict[int, list[int]] = {}

    @rule(shapes=st.lists(_SHAPES, min_size=1, max_size=4))
    def add(self, shapes: list[tuple[int, int, bool]]) -> None:
        start = len(self.by_id)
        requests = [
            make_request(number, prompt_len, max_tokens, ignore_eos=ignore_eos)
            for number, (prompt_len, max_tokens, ignore_eos) in enumerate(shapes, start=start)
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

    @rule(tokens=st.lists(st.sampled_from([WORD, WORD, WORD, EOS]), min_size=5, max_size=5))
    def step(self, tokens: list[int]) -> None:
        before = [number for number in self.arrived if self.by_id[number].block_ids]
        batch = self.scheduler.next_batch()
        self._check_batch(batch, before)
        outputs = commit(self.scheduler, batch, tokens[: len(batch.requests)])
        assert [output.request_id for output in outputs] == ids_of(batch)
        for output, part in zip(outputs, batch.requests, strict=True):
            self._take(output, part.request_id)

    def _check_batch(self, batch: Batch, running_before: list[int]) -> None:
        max_num_seqs, max_num_batched_tokens = self.limits
        assert len(batch.requests) <= max_num_seqs
        assert batch.num_tokens <= max_num_batched_tokens
        ids = ids_of(batch)
        assert ids == self.arrived[: len(ids)], "a request overtook another"
        assert ids[: len(running_before)] == running_before, "a request that had started was left out"
        assert ids or not self.arrived, "nothing runs though requests wait"
        for part in batch.requests:
            request, outputs = self.by_id[part.request_id], self.outputs.get(part.request_id, [])
            text = (*request.prompt_ids, *outputs)
            assert text[part.context_len :] == part.token_ids
            assert part.context_len == (len(text) - 1 if outputs else 0)
            assert len(part.block_ids) * self.scheduler.pool.block_size >= len(text)

    def _take(self, output: TokenOutput, number: int) -> None:
        request, outputs = self.by_id[number], self.outputs.setdefault(number, [])
        outputs.append(output.token_id)
        stopped = output.token_id == EOS and not request.params.ignore_eos
        expected = "stop" if stopped else "length" if len(outputs) == request.max_tokens else None
        assert output.finish_reason == expected
        if expected is not None:
            self.arrived.remove(number)

    @invariant()
    def every_block_has_one_owner(self) -> None:
        pool = self.scheduler.pool
        held = [block for number in self.arrived for block in self.by_id[number].block_ids]
        assert len(held) == len(set(held))
        assert 0 not in held
        assert len(held) + pool.num_free == pool.num_usable
        assert self.scheduler.num_unfinished == len(self.arrived)

    def teardown(self) -> None:
        for _ in range(12 * len(getattr(self, "arrived", ()))):
            if self.arrived:
                self.step([WORD] * 5)
        assert not getattr(self, "arrived", ())
        if hasattr(self, "scheduler"):
            assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable


AnyOrder.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to shrink a failure would take minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestAnyOrder = AnyOrder.TestCase
