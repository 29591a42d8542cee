"""Micro-batches against an independent computation: what each token writes and which slots its attention reads."""

from dataclasses import dataclass, replace
from itertools import chain, combinations_with_replacement, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.batch import Batch, MicroBatch, RequestSlice
from antiphon.core.plan import Plan
from antiphon.splitting import build_micro_batch, join, split


@dataclass(frozen=True)
class TokenWork:
    """What a step does for one token."""

    token_id: int
    position: int
    writes: int  # slot of its keys and values
    reads: tuple[int, ...]  # slots that its attention sees, in order of position


def make_request(number: int, query_len: int, context_len: int, block_size: int, extra_blocks: int = 0) -> RequestSlice:
    """Blocks are scattered and never shared; some requests have blocks reserved beyond their tokens."""
    num_blocks = -(-(query_len + context_len) // block_size) + extra_blocks
    return RequestSlice(
        request_id=100 + number,
        token_ids=tuple(1000 * number + index for index in range(query_len)),
        context_len=context_len,
        block_ids=tuple(1 + 40 * (number + 1) - 3 * index for index in range(num_blocks)),
    )


def make_batch(query_lens, context_lens, block_size: int, rank: int = 0, extra_blocks: int = 0) -> Batch:
    requests = [
        make_request(number, query_len, context_len, block_size, extra_blocks)
        for number, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True))
    ]
    return Batch(rank=rank, requests=tuple(requests))


def plan_of(*parts_by_rank: tuple[int, ...]) -> Plan:
    return Plan(part_tokens=parts_by_rank, reason="test")


def slot(request: RequestSlice, position: int, block_size: int) -> int:
    return request.block_ids[position // block_size] * block_size + position % block_size


def work_of_requests(requests, block_size: int) -> list[TokenWork]:
    """The meaning of a step, straight from its requests: causal attention over all that precedes a token."""
    work = []
    for request in requests:
        for index, token_id in enumerate(request.token_ids):
            position = request.context_len + index
            slots = tuple(slot(request, earlier, block_size) for earlier in range(position + 1))
            work.append(TokenWork(token_id, position, slots[-1], slots))
    return work


def work_of_metadata(part: MicroBatch, block_size: int) -> list[TokenWork]:
    """The same from what attention is given; every row belongs to exactly one group."""
    reads: dict[int, tuple[int, ...]] = {}

    def add(row: int, blocks: list[int], seq_len: int) -> None:
        assert row not in reads, f"row {row} is computed twice"
        reads[row] = tuple(blocks[p // block_size] * block_size + p % block_size for p in range(seq_len))

    if part.attention.decodes is not None:
        group = part.attention.decodes
        for row, blocks, seq_len in zip(
            group.rows_N.tolist(), group.block_table_NB.tolist(), group.seq_lens_N.tolist(), strict=True
        ):
            add(row, blocks, seq_len)
    for prefill in part.attention.prefills:
        for row in range(prefill.start, prefill.stop):
            add(row, prefill.block_ids_B.tolist(), prefill.context_len + row - prefill.start + 1)
    columns = (part.token_ids_T, part.positions_T, part.attention.slots_T)
    rows = enumerate(zip(*(column.tolist() for column in columns), strict=True))
    work = [TokenWork(*columns_of_row, reads.pop(row)) for row, columns_of_row in rows]
    assert reads == {}, "groups name rows that the micro-batch does not have"
    return work


def check_split(batch: Batch, plan: Plan, block_size: int) -> list[MicroBatch]:
    """Every lane does its share of the unsplit step's work, no more and no less."""
    parts = split(batch, plan, block_size=block_size)
    expected = work_of_requests(batch.requests, block_size)
    assert [part.lane for part in parts] == list(range(plan.num_lanes))
    assert [part.num_tokens for part in parts] == list(plan.part_tokens[batch.rank])
    work = [work_of_metadata(part, block_size) for part in parts]
    assert list(chain.from_iterable(work)) == expected
    for part, own in zip(parts, work, strict=True):
        assert work_of_requests(part.requests, block_size) == own
        check_no_empty_slices(part)
        check_blocks_fit(part, block_size)
    return parts


def check_no_empty_slices(part: MicroBatch) -> None:
    assert all(request.query_len > 0 for request in part.requests)
    ids = [request.request_id for request in part.requests]
    assert len(set(ids)) == len(ids), "a request has two slices in one part"


def check_blocks_fit(part: MicroBatch, block_size: int) -> None:
    """Blocks cover the sequence of each slice, and none beyond it is read."""
    for prefill in part.attention.prefills:
        seq_len = prefill.context_len + prefill.stop - prefill.start
        assert seq_len <= len(prefill.block_ids_B) * block_size < seq_len + block_size
    if part.attention.decodes is not None:
        table = part.attention.decodes.block_table_NB
        longest = part.attention.decodes.seq_lens_N.max().item()
        assert longest <= table.shape[1] * block_size < longest + block_size


def compositions(total: int, num_parts: int):
    """All ways to give `total` tokens to lanes, empty lanes included."""
    for cuts in combinations_with_replacement(range(total + 1), num_parts - 1):
        edges = [0, *cuts, total]
        yield tuple(stop - start for start, stop in pairwise(edges))


@st.composite
def batches_and_plans(draw):
    block_size = draw(st.integers(1, 5))
    shapes = draw(st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 5, 9]), st.integers(0, 12)), max_size=7))
    num_ranks = draw(st.integers(1, 3))
    rank = draw(st.integers(0, num_ranks - 1))
    batch = make_batch(
        [query for query, _ in shapes],
        [context for _, context in shapes],
        block_size,
        rank=rank,
        extra_blocks=draw(st.integers(0, 2)),
    )
    num_lanes = draw(st.integers(1, 6))
    cuts = draw(st.lists(st.integers(0, batch.num_tokens), min_size=num_lanes - 1, max_size=num_lanes - 1).map(sorted))
    edges = [0, *cuts, batch.num_tokens]
    own = tuple(stop - start for start, stop in pairwise(edges))
    others = st.tuples(*[st.integers(0, 20)] * num_lanes)
    plan = plan_of(*(own if index == rank else draw(others) for index in range(num_ranks)))
    return batch, plan, block_size


@settings(deadline=None, max_examples=200)
@given(batches_and_plans())
def test_any_split_does_the_work_of_the_unsplit_step(case):
    batch, plan, block_size = case
    parts = check_split(batch, plan, block_size)
    for lane, part in enumerate(parts):
        assert part.rows_by_rank == tuple(row[lane] for row in plan.part_tokens)


@settings(deadline=None, max_examples=100)
@given(batches_and_plans())
def test_joined_parts_are_the_unsplit_micro_batch(case):
    batch, plan, block_size = case
    parts = split(batch, plan, block_size=block_size)
    (whole,) = split(batch, plan_of(*[(sum(row),) for row in plan.part_tokens]), block_size=block_size)
    for name in ("token_ids_T", "positions_T"):
        assert torch.equal(join([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert torch.equal(join([part.attention.slots_T for part in parts]), whole.attention.slots_T)


@pytest.mark.parametrize("query_lens", [(4,), (1, 3), (3, 1), (1, 1, 1), (2, 1, 2), (1, 4, 1)])
def test_every_cut_position_of_small_batches(query_lens):
    total = sum(query_lens)
    for context_lens in product((0, 2, 5), repeat=len(query_lens)):
        batch = make_batch(query_lens, context_lens, block_size=3)
        for num_lanes in (1, 2, 3):
            for own in compositions(total, num_lanes):
                check_split(batch, plan_of(own), block_size=3)


def seq_lens(part: MicroBatch) -> dict[int, int]:
    """First row of each slice -> context plus new tokens, from the metadata alone."""
    found = {p.start: p.context_len + p.stop - p.start for p in part.attention.prefills}
    if part.attention.decodes is not None:
        group = part.attention.decodes
        found.update(zip(group.rows_N.tolist(), group.seq_lens_N.tolist(), strict=True))
    return found


@pytest.mark.parametrize(
    ("part_tokens", "first", "second"),
    [
        ((12, 4), [32, 36], [40]),
        ((4, 12), [28], [32, 40]),
        ((8, 8), [32], [40]),
        ((9, 7), [32, 33], [40]),
        ((15, 1), [32, 39], [40]),
    ],
)
def test_the_context_of_a_straddling_request_grows_by_the_tokens_before_the_cut(part_tokens, first, second):
    batch = make_batch([8, 8], [24, 32], block_size=16)
    one, two = check_split(batch, plan_of(part_tokens), block_size=16)
    assert list(seq_lens(one).values()) == first
    assert list(seq_lens(two).values()) == second


def test_a_straddling_request_reads_in_the_second_part_what_the_first_wrote():
    batch = make_batch([6], [3], block_size=2)
    one, two = split(batch, plan_of((4, 2)), block_size=2)
    written = set(one.attention.slots_T.tolist())
    for work in work_of_metadata(two, 2):
        assert written < set(work.reads)


@pytest.mark.parametrize("part_tokens", [(5, 0), (0, 5), (0, 5, 0), (0, 2, 0, 3)])
def test_a_lane_without_tokens_is_a_dummy_that_knows_its_peers(part_tokens):
    plan = plan_of(part_tokens, tuple(range(7, 7 + len(part_tokens))))
    batch = make_batch([5], [2], block_size=4)
    for lane, part in enumerate(check_split(batch, plan, block_size=4)):
        assert part.rows_by_rank == (part_tokens[lane], 7 + lane)
        if part_tokens[lane] == 0:
            assert part.requests == ()
            assert part.attention.decodes is None
            assert part.attention.prefills == ()
            for tensor in (part.token_ids_T, part.positions_T, part.attention.slots_T):
                assert (tuple(tensor.shape), tensor.dtype) == ((0,), torch.int64)


def test_an_idle_rank_gets_dummies_only():
    parts = split(Batch(rank=1, requests=()), plan_of((8, 8), (0, 0)), block_size=4)
    assert [(part.num_tokens, part.rows_by_rank) for part in parts] == [(0, (8, 0)), (0, (8, 0))]


def test_a_prompt_of_one_token_reads_itself_only():
    (part,) = check_split(make_batch([1], [0], block_size=4), plan_of((1,)), block_size=4)
    assert part.attention.decodes.seq_lens_N.tolist() == [1]
    assert part.attention.prefills == ()


def test_decodes_between_prefills_keep_their_rows():
    batch = make_batch([1, 3, 1, 2, 1], [7, 0, 2, 5, 30], block_size=4)
    (part,) = check_split(batch, plan_of((8,)), block_size=4)
    assert part.attention.decodes.rows_N.tolist() == [0, 4, 7]
    assert part.attention.decodes.seq_lens_N.tolist() == [8, 3, 31]
    assert [(p.start, p.stop, p.context_len) for p in part.attention.prefills] == [(1, 4, 0), (5, 7, 5)]


def test_short_decodes_are_padded_with_block_0():
    batch = make_batch([1, 1], [2, 11], block_size=4)
    (part,) = split(batch, plan_of((2,)), block_size=4)
    table = part.attention.decodes.block_table_NB.tolist()
    assert [len(row) for row in table] == [3, 3]
    assert table[0] == [batch.requests[0].block_ids[0], 0, 0]
    assert table[1] == list(batch.requests[1].block_ids)


def test_the_block_table_of_a_part_is_as_wide_as_its_own_longest_request():
    batch = make_batch([1, 1, 1, 1], [2, 3, 30, 31], block_size=4)
    short, long = split(batch, plan_of((2, 2)), block_size=4)
    assert short.attention.decodes.block_table_NB.shape == (2, 1)
    assert long.attention.decodes.block_table_NB.shape == (2, 8)


def test_tensors_are_on_the_cpu_and_have_the_dtypes_that_kernels_take():
    batch = make_batch([1, 3], [2, 5], block_size=4)
    for part in split(batch, plan_of((2, 2)), block_size=4):
        attention = part.attention
        tensors = [part.token_ids_T, part.positions_T, attention.slots_T]
        tensors += [prefill.block_ids_B for prefill in attention.prefills]
        if attention.decodes is not None:
            tensors.append(attention.decodes.rows_N)
            small = [attention.decodes.block_table_NB, attention.decodes.seq_lens_N]
            assert {(tensor.dtype, tensor.device.type) for tensor in small} == {(torch.int32, "cpu")}
        assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(torch.int64, "cpu")}


def test_a_plan_for_another_batch_is_caught():
    with pytest.raises(AssertionError, match=r"\b5 tokens\b"):
        split(make_batch([5], [0], block_size=4), plan_of((3, 3)), block_size=4)


def test_split_uses_the_row_of_its_own_rank():
    batch = make_batch([5], [0], block_size=4, rank=2)
    parts = split(batch, plan_of((9, 9), (1, 0), (2, 3)), block_size=4)
    assert [part.num_tokens for part in parts] == [2, 3]


def test_the_batch_is_left_as_it_was():
    batch = make_batch([5, 3], [4, 1], block_size=4)
    before = repr(batch)
    split(batch, plan_of((3, 5)), block_size=4)
    assert repr(batch) == before


def test_build_micro_batch_of_given_slices():
    request = make_request(0, query_len=6, context_len=3, block_size=4).cut(2, 5)
    part = build_micro_batch([request], lane=3, rows_by_rank=(1, 3), block_size=4)
    assert (part.lane, part.rows_by_rank, part.requests) == (3, (1, 3), (request,))
    assert part.positions_T.tolist() == [5, 6, 7]
    assert work_of_metadata(part, 4) == work_of_requests([request], 4)


@pytest.mark.parametrize("parts", [(9,), (4, 5), (0, 9), (9, 0)])
def test_padding_decodes_nothing_in_block_0(parts):
    """A request of 5 new tokens, one of 3 and one that decodes, in lanes of 10 rows."""
    batch = make_batch([5, 1, 3], [0, 6, 2], block_size=4)
    plan = replace(plan_of(parts), graph=10)
    for padded, eager in zip(
        split(batch, plan, block_size=4), split(batch, replace(plan, graph=0), block_size=4), strict=True
    ):
        real, padding = eager.num_tokens, 10 - eager.num_tokens
        assert (padded.num_tokens, padded.rows_by_rank, padded.requests) == (real, (10,), eager.requests)
        assert padded.num_real_1.tolist() == [real]
        assert eager.num_real_1 is None
        for name in ("token_ids_T", "positions_T"):
            assert getattr(padded, name).tolist() == getattr(eager, name).tolist() + [0] * padding
        assert padded.attention.slots_T.tolist() == eager.attention.slots_T.tolist() + [0] * padding
        assert [(p.start, p.stop) for p in padded.attention.prefills] == [
            (p.start, p.stop) for p in eager.attention.prefills
        ]
        decodes, before = padded.attention.decodes, eager.attention.decodes
        num_decodes = 0 if before is None else len(before.rows_N)
        assert decodes.rows_N.tolist() == ([] if before is None else before.rows_N.tolist()) + list(range(real, 10))
        assert decodes.seq_lens_N[num_decodes:].tolist() == [0] * padding
        assert decodes.block_table_NB[num_decodes:].eq(0).all()
        if before is not None:
            assert torch.equal(decodes.seq_lens_N[:num_decodes], before.seq_lens_N)
            assert torch.equal(decodes.block_table_NB[:num_decodes], before.block_table_NB)


def test_more_tokens_than_padded_rows_are_caught():
    with pytest.raises(AssertionError, match=r"\b5 tokens\b.*\b4\b"):
        split(make_batch([5], [0], block_size=4), replace(plan_of((5,)), graph=4), block_size=4)


def test_hidden_states_of_dummies_join_without_a_trace():
    hidden_TD = torch.randn(5, 4)
    assert torch.equal(join([hidden_TD[:0], hidden_TD[:2], hidden_TD[:0], hidden_TD[2:]]), hidden_TD)
