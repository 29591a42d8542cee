"""The chunks of a slab."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.comm.slab.host_staged import chunks_of


@settings(deadline=None)
@given(st.integers(min_value=0, max_value=1 << 32))
def test_chunks_cover_the_slab_without_gaps(num_bytes: int) -> None:
    chunks = chunks_of(num_bytes)
    assert 1 <= len(chunks) <= 8
    assert [chunk.start for chunk in chunks] == [sum(c.num_bytes for c in chunks[:n]) for n in range(len(chunks))]
    assert sum(chunk.num_bytes for chunk in chunks) == num_bytes
    assert all(chunk.num_bytes > 0 for chunk in chunks) or num_bytes == 0


@pytest.mark.parametrize(("num_bytes", "count"), [(0, 1), (1, 1), (2**21 - 1, 1), (2**21, 2), (2**23, 8), (2**29, 8)])
def test_small_slabs_stay_whole(num_bytes: int, count: int) -> None:
    assert len(chunks_of(num_bytes)) == count
