"""Requests, batches, and the micro-batch that a lane runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.batch import Batch, RequestSlice, current_micro_batch, use_micro_batch
from antiphon.runtime import run_lanes, switch
from antiphon.splitting import build_micro_batch


def request_slice(query_len: int, context_len: int = 0) -> RequestSlice:
    return RequestSlice(request_id=1, token_ids=tuple(range(query_len)), context_len=context_len, block_ids=(4, 5))


def micro_batch(lane: int):
    return build_micro_batch([], lane=lane, rows_by_rank=(0,), block_size=4)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 9), st.data())
def test_cutting_a_slice_moves_what_lies_before_into_the_context(query_len, context_len, data):
    start = data.draw(st.integers(0, query_len))
    stop = data.draw(st.integers(start, query_len))
    whole = request_slice(query_len, context_len)
    part = whole.cut(start, stop)
    assert part.token_ids == tuple(range(start, stop))
    assert part.context_len == context_len + start
    assert (part.request_id, part.block_ids) == (whole.request_id, whole.block_ids)


def test_cutting_twice_is_cutting_once():
    whole = request_slice(10, 3)
    assert whole.cut(2, 9).cut(1, 4) == whole.cut(3, 6)


@pytest.mark.parametrize(
    ("shapes", "decode_only"),
    [
        ([], False),
        ([(1, 5)], True),
        ([(1, 5), (1, 1)], True),
        ([(1, 0)], False),
        ([(1, 5), (1, 0)], False),
        ([(2, 5)], False),
        ([(1, 5), (3, 0)], False),
    ],
)
def test_a_batch_only_decodes_if_every_request_continues_by_one_token(shapes, decode_only):
    assert Batch(rank=0, requests=tuple(request_slice(*shape) for shape in shapes)).decode_only is decode_only


def test_counts_of_a_batch():
    batch = Batch(rank=0, requests=(request_slice(3), request_slice(1, 7)))
    assert (batch.query_lens, batch.num_tokens) == ([3, 1], 4)
    assert (Batch(rank=0, requests=()).query_lens, Batch(rank=0, requests=()).num_tokens) == ([], 0)


def test_there_is_no_current_micro_batch_outside_a_forward_pass():
    with pytest.raises(LookupError):
        current_micro_batch()


def test_the_current_micro_batch_is_the_innermost_and_restored_after_an_error():
    outer, inner = micro_batch(0), micro_batch(1)
    with use_micro_batch(outer):
        with pytest.raises(OSError, match="inside"), use_micro_batch(inner):
            assert current_micro_batch() is inner
            raise OSError("inside")
        assert current_micro_batch() is outer
    with pytest.raises(LookupError):
        current_micro_batch()


def test_every_lane_has_its_own_current_micro_batch():
    parts = [micro_batch(lane) for lane in range(3)]

    def body(part):
        with use_micro_batch(part):
            seen = []
            for _ in range(3):
                seen.append(current_micro_batch() is part)
                switch()
            return seen

    assert run_lanes([lambda part=part: body(part) for part in parts]) == [[True] * 3] * 3
    with pytest.raises(LookupError):
        current_micro_batch()
