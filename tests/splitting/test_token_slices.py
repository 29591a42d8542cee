"""From cut positions to slices of tokens and of the requests that have a token in them."""

from itertools import accumulate, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.errors import OptionError
from antiphon.splitting import MicroSlice, token_slices
from tests.support.errors import raises


def micro_slice(tokens: tuple[int, int], requests: tuple[int, int]) -> MicroSlice:
    return MicroSlice(slice(*tokens), slice(*requests))


@pytest.mark.parametrize(
    ("query_lens", "cuts", "expected"),
    [
        ([8, 8], [12], [micro_slice((0, 12), (0, 2)), micro_slice((12, 16), (1, 2))]),
        ([8, 8], [4], [micro_slice((0, 4), (0, 1)), micro_slice((4, 16), (0, 2))]),
        ([8, 8], [8], [micro_slice((0, 8), (0, 1)), micro_slice((8, 16), (1, 2))]),
        ([8, 8], [], [micro_slice((0, 16), (0, 2))]),
        ([6], [2, 4], [micro_slice((0, 2), (0, 1)), micro_slice((2, 4), (0, 1)), micro_slice((4, 6), (0, 1))]),
        ([1, 1, 1], [1], [micro_slice((0, 1), (0, 1)), micro_slice((1, 3), (1, 3))]),
    ],
)
def test_examples(query_lens, cuts, expected):
    assert token_slices(query_lens, cuts) == expected


def owners(query_lens: list[int]) -> list[int]:
    """The request of every token."""
    return [request for request, length in enumerate(query_lens) for _ in range(length)]


@st.composite
def batches_and_cuts(draw):
    query_lens = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    total = sum(query_lens)
    cuts = draw(st.lists(st.integers(1, max(total - 1, 1)), unique=True, max_size=min(7, total - 1)).map(sorted))
    return query_lens, cuts


@settings(deadline=None)
@given(batches_and_cuts())
def test_slices_partition_the_tokens_and_name_their_requests(case):
    query_lens, cuts = case
    parts = token_slices(query_lens, cuts)
    tokens = list(range(sum(query_lens)))
    assert [token for part in parts for token in tokens[part.token_slice]] == tokens
    assert [part.token_slice.start for part in parts[1:]] == cuts
    for part in parts:
        requests = list(range(len(query_lens)))[part.request_slice]
        assert requests == sorted(set(owners(query_lens)[part.token_slice]))


def test_every_cut_of_a_small_batch_puts_straddling_requests_into_both_parts():
    query_lens = [3, 1, 4, 2]
    boundaries = set(accumulate(query_lens))
    for cut in range(1, sum(query_lens)):
        first, second = token_slices(query_lens, [cut])
        shared = first.request_slice.stop - second.request_slice.start
        assert shared == (0 if cut in boundaries else 1), cut


def test_a_request_can_be_in_every_part():
    for cuts in combinations(range(1, 9), 3):
        assert [part.request_slice for part in token_slices([9], cuts)] == [slice(0, 1)] * 4


@pytest.mark.parametrize("cuts", [[0], [16], [17], [-1], [8, 8], [9, 8], [4, 16]])
def test_cuts_that_make_an_empty_part_are_errors(cuts):
    with raises(OptionError, "16", option="cuts", value=cuts, remedy="below 16"):
        token_slices([8, 8], cuts)


@pytest.mark.parametrize("length", [0, -1])
def test_requests_without_tokens_are_errors(length):
    with raises(OptionError, option="query_lens[1]", value=length):
        token_slices([8, length, 8], [4])


def test_an_empty_batch_has_no_part():
    with pytest.raises(OptionError):
        token_slices([], [])
