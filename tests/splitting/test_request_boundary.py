"""The cut between requests: the vectors of the reference, strictness, and no empty parts."""

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.errors import OptionError
from antiphon.splitting import request_boundary
from tests.support.errors import raises

NO_CUT = (0, 0)
lengths = st.lists(st.integers(1, 40), max_size=12)
ratios = st.floats(0, 1)


@pytest.mark.parametrize(
    ("query_lens", "cut"),
    [
        ([2, 3, 5], (5, 2)),
        ([1, 2, 3, 4], NO_CUT),
        ([], NO_CUT),
        ([10], NO_CUT),
        ([150, 100], NO_CUT),
        ([127, 129], (127, 1)),
        ([129, 127], (129, 1)),
        ([4, 4], (4, 1)),
        ([1, 1, 1, 1], (2, 2)),
    ],
)
def test_vectors_of_the_reference(query_lens, cut):
    assert request_boundary(query_lens, num_tokens=sum(query_lens)) == cut


@pytest.mark.parametrize(("num_tokens", "cut"), [(10, (5, 5)), (7, (3, 3)), (1, NO_CUT), (0, NO_CUT), (2, (1, 1))])
@pytest.mark.parametrize("query_lens", [None, [], [100, 3]])
def test_decode_only_batches_are_cut_in_the_middle_of_num_tokens(num_tokens, cut, query_lens):
    assert request_boundary(query_lens, num_tokens=num_tokens, decode_only=True) == cut


@pytest.mark.parametrize("num_tokens", [0, 1, 256, 10**6])
def test_num_tokens_is_ignored_unless_decode_only(num_tokens):
    assert request_boundary([2, 3, 5], num_tokens=num_tokens) == (5, 2)
    assert request_boundary(None, num_tokens=num_tokens) == NO_CUT


@pytest.mark.parametrize(
    ("query_lens", "ratio", "cut"),
    [
        ([60, 40], 0.1, NO_CUT),  # |60 - 50| < 10 is false: strict
        ([60, 40], 0.101, (60, 1)),
        ([59, 41], 0.1, (59, 1)),
        ([40, 60], 0.1, NO_CUT),  # the boundary before, |40 - 50| < 10 is false
        ([40, 60], 0.101, (40, 1)),
        ([41, 59], 0.1, (41, 1)),
        ([50, 50], 0.0, NO_CUT),  # even an exact cut is not strictly within nothing
        ([50, 50], 0.001, (50, 1)),
        ([75, 25], 0.25, NO_CUT),
        ([75, 25], 0.2500001, (75, 1)),
    ],
)
def test_the_tolerance_is_strict(query_lens, ratio, cut):
    assert request_boundary(query_lens, num_tokens=0, imbalance_ratio=ratio) == cut


@pytest.mark.parametrize(
    ("query_lens", "ratio", "cut"),
    [
        ([48, 4, 48], 0.1, (52, 2)),  # both boundaries are near: the one after wins
        ([46, 20, 34], 0.1, (46, 1)),  # 66 is too far: fall back to the boundary before
        ([30, 50, 20], 0.1, NO_CUT),
        ([100, 1], 1.0, (100, 1)),
        ([1, 100], 1.0, (1, 1)),  # after the last request nothing would be left
    ],
)
def test_the_boundary_after_is_tried_first_then_the_one_before(query_lens, ratio, cut):
    assert request_boundary(query_lens, num_tokens=0, imbalance_ratio=ratio) == cut


def test_the_middle_is_rounded_down():
    assert request_boundary([4, 5], num_tokens=9, imbalance_ratio=0.01) == (4, 1)
    assert request_boundary([5, 4], num_tokens=9, imbalance_ratio=0.01) == NO_CUT


def test_the_default_ratio_is_a_tenth():
    for query_lens in ([59, 41], [60, 40], [41, 59], [40, 60]):
        explicit = request_boundary(query_lens, num_tokens=0, imbalance_ratio=0.1)
        assert request_boundary(query_lens, num_tokens=0) == explicit


def allowed_boundaries(query_lens: list[int], ratio: float) -> tuple[int, int]:
    """The rule in terms of prefix sums: the first at or past the middle, else the one before it."""
    total = sum(query_lens)
    prefixes = [0, *accumulate(query_lens)]
    after = next(index for index, tokens in enumerate(prefixes) if index > 0 and tokens >= total // 2)
    for index in (after, after - 1):
        if 0 < prefixes[index] < total and abs(prefixes[index] - total // 2) < total * ratio:
            return (prefixes[index], index)
    return NO_CUT


@settings(deadline=None)
@given(lengths.filter(bool), ratios)
def test_any_batch_follows_the_rule(query_lens, ratio):
    assert request_boundary(query_lens, num_tokens=0, imbalance_ratio=ratio) == allowed_boundaries(query_lens, ratio)


@settings(deadline=None)
@given(lengths, ratios)
def test_no_part_is_empty_for_any_ratio(query_lens, ratio):
    tokens, requests = request_boundary(query_lens, num_tokens=0, imbalance_ratio=ratio)
    assert (tokens, requests) == NO_CUT or 0 < tokens < sum(query_lens)
    assert sum(query_lens[:requests]) == tokens


@settings(deadline=None)
@given(st.integers(0, 5000))
def test_no_decode_part_is_empty(num_tokens):
    tokens, requests = request_boundary(None, num_tokens=num_tokens, decode_only=True)
    assert tokens == requests
    assert num_tokens - 2 * tokens in (0, 1)


@pytest.mark.parametrize("query_lens", [[0, 1], [0, 0, 1], [1, 0], [0, 5, 0], [0, 0], [0]])
@pytest.mark.parametrize("ratio", [0.1, 0.6, 1.0])
def test_requests_without_tokens_make_no_empty_part(query_lens, ratio):
    tokens, requests = request_boundary(query_lens, num_tokens=0, imbalance_ratio=ratio)
    assert (tokens, requests) == NO_CUT or 0 < tokens < sum(query_lens)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf"), -1])
@pytest.mark.parametrize("decode_only", [False, True])
def test_a_ratio_out_of_range_is_an_error(ratio, decode_only):
    with raises(OptionError, str(ratio), option="imbalance_ratio", remedy="0 to 1"):
        request_boundary([5, 5], num_tokens=10, decode_only=decode_only, imbalance_ratio=ratio)


def test_a_negative_length_is_an_error_that_names_it():
    with raises(OptionError, option="query_lens[1]", value=-3):
        request_boundary([5, -3, 8], num_tokens=10)


def test_a_negative_number_of_decode_tokens_is_an_error():
    with raises(OptionError, option="num_tokens", value=-3):
        request_boundary(None, num_tokens=-3, decode_only=True)
