"""The blocks of the KV cache: holders, keys, and which one is taken first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.engine.cache.block_pool import BlockPool, block_key

A, B, C, D = (bytes([letter]) * 16 for letter in b"ABCD")


def test_takes_all_but_block_0_and_gives_back() -> None:
    pool = BlockPool(5, 16)
    assert (pool.num_usable, pool.num_free) == (4, 4)
    first = pool.take(3)
    assert first is not None and len(set(first)) == 3 and 0 not in first
    assert pool.take(2) is None
    assert pool.num_free == 1, "a failed attempt takes nothing"
    pool.give_back(first)
    assert pool.num_free == 4
    assert sorted(pool.take(4) or ()) == [1, 2, 3, 4]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(3, 16).blocks_for(tokens) == blocks


def test_a_block_that_is_given_back_twice_is_an_error() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.take(1)
    assert blocks is not None
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match=rf"\bblock {blocks[0]}\b"):
        pool.give_back(blocks)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_small_pool(num_blocks: int) -> None:
    pool = BlockPool(num_blocks, 4)
    assert pool.num_usable == pool.num_free == num_blocks - 1
    assert pool.take(num_blocks) is None
    assert pool.take(0) == ()


def test_published_blocks_are_found_up_to_the_first_unknown_one() -> None:
    pool = BlockPool(6, 16)
    blocks = pool.take(3)
    assert blocks is not None
    pool.publish(blocks[0], A)
    pool.publish(blocks[2], C)
    assert pool.find([A, B, C]) == [blocks[0]]
    pool.publish(blocks[1], B)
    assert pool.find([A, B, C]) == list(blocks)
    assert pool.find([B]) == [blocks[1]]
    assert pool.find([D, A]) == []


def test_nothing_is_remembered_without_prefix_caching() -> None:
    pool = BlockPool(3, 16, prefix_caching=False)
    blocks = pool.take(1)
    assert blocks is not None
    pool.publish(blocks[0], A)
    assert pool.find([A]) == []


def test_a_shared_block_is_free_when_the_last_holder_has_given_it_back() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.take(1)
    assert blocks is not None
    pool.publish(blocks[0], A)
    pool.hold(pool.find([A]))
    pool.give_back(blocks)
    assert pool.num_free == 1
    pool.give_back(blocks)
    assert pool.num_free == 2
    assert pool.find([A]) == list(blocks), "its contents are known as long as nobody takes it"
    assert pool.num_free_beside(blocks) == 1
    pool.hold(blocks)
    assert (pool.num_free, pool.num_free_beside(blocks)) == (1, 1)


def test_unknown_blocks_are_taken_first_then_the_end_of_the_text_given_back_first() -> None:
    pool = BlockPool(7, 16)
    first, second = pool.take(2), pool.take(2)
    assert first is not None and second is not None
    for block, key in zip((*first, *second), (A, B, C, D), strict=True):
        pool.publish(block, key)
    pool.give_back(second)
    pool.give_back(first)
    assert not set(pool.take(2) or ()) & {*first, *second}
    order = [block for _ in range(4) for block in pool.take(1) or ()]
    assert order == [second[1], second[0], first[1], first[0]]
    assert pool.find([A]) == pool.find([C]) == [], "what is taken is forgotten"


def test_a_held_block_keeps_its_contents_and_a_key_its_first_block() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.take(2)
    assert blocks is not None
    pool.publish(blocks[0], A)
    pool.publish(blocks[1], A)
    assert pool.find([A]) == [blocks[0]]
    pool.give_back(blocks[1:])
    taken = pool.take(2)
    assert taken is not None and blocks[0] not in taken
    assert pool.find([A]) == [blocks[0]]


def test_keys_say_all_tokens_before() -> None:
    first, second = block_key(b"", (1, 2)), block_key(b"", (3, 4))
    assert block_key(b"", (1, 2)) == first != second
    assert block_key(first, (5, 6)) != block_key(second, (5, 6))
    assert block_key(b"", (12, 3)) != block_key(b"", (1, 23))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60))
def test_every_block_is_held_or_free(events: list[tuple[int, int]]) -> None:
    """Random requests take, publish, share and give back blocks; the counts are right after each event."""
    pool, held, number = BlockPool(9, 4), [], 0
    for kind, value in events:
        if kind == 0 and (blocks := pool.take(value % 4)) is not None:
            held.append(blocks)
        elif kind == 1 and held:
            for block in held[value % len(held)]:
                number += 1
                pool.publish(block, number.to_bytes(16, "little"))
        elif kind == 2 and held:
            shared = held[value % len(held)]
            pool.hold(shared)
            held.append(shared)
        elif kind == 3 and held:
            pool.give_back(held.pop(value % len(held)))
        assert pool.num_free + len({block for blocks in held for block in blocks}) == pool.num_usable
        for key in range(1, number + 1):
            for block in pool.find([key.to_bytes(16, "little")]):
                assert 0 < block < 9
    for blocks in held:
        pool.give_back(blocks)
    assert pool.num_free == pool.num_usable
