"""Tokens of each part for both rules and any number of parts."""

from itertools import accumulate

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from antiphon.core.errors import OptionError
from antiphon.core.plan import MAX_LANES, SerialReason
from antiphon.core.policy import SPLIT_RULES
from antiphon.splitting import Cut, find_cut, request_boundary
from tests.support.errors import raises

lengths = st.lists(st.integers(1, 40), max_size=30)
parts = st.integers(2, MAX_LANES)
rules = st.sampled_from(SPLIT_RULES)


def even_targets(total: int, num_parts: int) -> list[int]:
    return [total * part // num_parts for part in range(1, num_parts)]


@pytest.mark.parametrize(
    ("query_lens", "num_parts", "part_tokens"),
    [
        ([8, 8], 2, (8, 8)),
        ([7], 2, (3, 4)),
        ([10], 3, (3, 3, 4)),
        ([1, 2, 3, 4], 2, (5, 5)),
        ([8], 8, (1,) * 8),
        ([11], 4, (2, 3, 3, 3)),
    ],
)
def test_the_token_rule_cuts_evenly(query_lens, num_parts, part_tokens):
    assert find_cut(query_lens, num_parts=num_parts, rule="token") == Cut(part_tokens)


@settings(deadline=None)
@given(lengths, parts)
def test_parts_of_the_token_rule_differ_by_one_token_at_most(query_lens, num_parts):
    assume(sum(query_lens) >= num_parts)
    cut = find_cut(query_lens, num_parts=num_parts, rule="token")
    assert cut.refusal is SerialReason.NONE
    assert len(cut.part_tokens) == num_parts
    assert sum(cut.part_tokens) == sum(query_lens)
    assert max(cut.part_tokens) - min(cut.part_tokens) <= 1
    assert min(cut.part_tokens) >= 1


@settings(deadline=None)
@given(st.integers(0, 200), parts, rules, st.floats(0, 1))
@example(num_requests=8, num_parts=2, rule="request-boundary", ratio=0.0)
def test_decode_only_batches_are_cut_evenly_by_both_rules(num_requests, num_parts, rule, ratio):
    cut = find_cut([1] * num_requests, num_parts=num_parts, rule=rule, decode_only=True, imbalance_ratio=ratio)
    if num_requests < num_parts:
        assert cut == Cut((num_requests,), SerialReason.TOO_FEW_TOKENS)
    else:
        assert cut == find_cut([num_requests], num_parts=num_parts, rule="token")


@settings(deadline=None)
@given(lengths, st.floats(0, 1))
def test_two_parts_at_a_boundary_are_those_of_request_boundary(query_lens, ratio):
    assume(sum(query_lens) >= 2)
    tokens, _ = request_boundary(query_lens, num_tokens=0, imbalance_ratio=ratio)
    cut = find_cut(query_lens, num_parts=2, rule="request-boundary", imbalance_ratio=ratio)
    if tokens == 0:
        assert cut == Cut((sum(query_lens),), SerialReason.NO_BOUNDARY)
    else:
        assert cut == Cut((tokens, sum(query_lens) - tokens))


@settings(deadline=None)
@given(lengths, parts, st.floats(0, 1))
def test_boundary_cuts_are_boundaries_near_the_even_cuts(query_lens, num_parts, ratio):
    cut = find_cut(query_lens, num_parts=num_parts, rule="request-boundary", imbalance_ratio=ratio)
    total = sum(query_lens)
    assert sum(cut.part_tokens) == total
    if cut.refusal is not SerialReason.NONE:
        assert cut.part_tokens == (total,)
        return
    assert len(cut.part_tokens) == num_parts
    assert min(cut.part_tokens) >= 1
    cuts = list(accumulate(cut.part_tokens))[:-1]
    assert set(cuts) <= set(accumulate(query_lens))
    for position, target in zip(cuts, even_targets(total, num_parts), strict=True):
        assert abs(position - target) < total * ratio


@pytest.mark.parametrize("num_parts", range(2, MAX_LANES + 1))
def test_equal_requests_are_cut_at_boundaries_into_any_number_of_parts(num_parts):
    cut = find_cut([5] * num_parts * 3, num_parts=num_parts, rule="request-boundary", imbalance_ratio=0.01)
    assert cut == Cut((15,) * num_parts)


@pytest.mark.parametrize(
    ("query_lens", "num_parts", "ratio"),
    [
        ([10], 2, 1.0),
        ([150, 100], 2, 0.1),
        ([60, 40], 2, 0.1),
        ([5, 5], 2, 0.0),
        ([5, 5], 3, 0.5),
        ([1, 28, 1], 3, 0.1),
    ],
)
def test_without_a_boundary_near_the_cut_the_batch_stays_whole(query_lens, num_parts, ratio):
    cut = find_cut(query_lens, num_parts=num_parts, rule="request-boundary", imbalance_ratio=ratio)
    assert cut == Cut((sum(query_lens),), SerialReason.NO_BOUNDARY)


@pytest.mark.parametrize("rule", SPLIT_RULES)
@pytest.mark.parametrize("num_parts", range(2, MAX_LANES + 1))
def test_fewer_tokens_than_parts_are_not_cut(rule, num_parts):
    for query_lens in ([], [num_parts - 1], [1] * (num_parts - 1)):
        cut = find_cut(query_lens, num_parts=num_parts, rule=rule)
        assert cut == Cut((sum(query_lens),), SerialReason.TOO_FEW_TOKENS)


@pytest.mark.parametrize("rule", SPLIT_RULES)
@pytest.mark.parametrize("query_lens", [[], [1], [3, 4]])
def test_one_part_is_the_whole_batch_and_no_refusal(rule, query_lens):
    assert find_cut(query_lens, num_parts=1, rule=rule) == Cut((sum(query_lens),))


def test_an_unknown_rule_is_an_error_that_names_the_nearest():
    with raises(OptionError, option="split", value="request_boundary", remedy="'request-boundary'"):
        find_cut([5, 5], num_parts=2, rule="request_boundary")


@pytest.mark.parametrize("num_parts", [0, -1, MAX_LANES + 1])
def test_a_number_of_parts_out_of_range_is_an_error(num_parts):
    with raises(OptionError, option="num_parts", value=num_parts, remedy=f"1 to {MAX_LANES}"):
        find_cut([50], num_parts=num_parts, rule="token")


@pytest.mark.parametrize("rule", SPLIT_RULES)
def test_a_negative_length_is_an_error_that_names_it(rule):
    with raises(OptionError, option="query_lens[0]", value=-1):
        find_cut([-1, 9], num_parts=2, rule=rule)
