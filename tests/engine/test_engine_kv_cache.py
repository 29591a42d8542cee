"""Blocks of the KV cache: how many fit, who has them, and that they come back."""

from __future__ import annotations

import random

import pytest
import torch

from antiphon.engine.kv_cache import BlockPool, allocate_cache, block_bytes
from antiphon.models import ModelConfig

CONFIG = ModelConfig(
    architecture="any",
    num_layers=3,
    hidden_size=8,
    vocab_size=16,
    max_positions=64,
    num_experts=4,
    top_k=2,
    kv_width=10,
    eos_token_ids=(),
)


@pytest.mark.parametrize(
    ("dtype", "block_size", "memory_bytes", "expected"),
    [
        (torch.float32, 4, 480 * 7, 7),
        (torch.float32, 4, 480 * 7 - 1, 6),
        (torch.bfloat16, 4, 480 * 7, 14),
        (torch.float64, 16, 3840 * 2 + 5, 2),
        (torch.float32, 4, 0, 0),
    ],
)
def test_blocks_that_fit(dtype: torch.dtype, block_size: int, memory_bytes: int, expected: int) -> None:
    assert memory_bytes // block_bytes(CONFIG, block_size=block_size, dtype=dtype) == expected


def test_the_cache_is_as_large_as_was_counted() -> None:
    cache = allocate_cache(CONFIG, num_blocks=5, block_size=4, dtype=torch.bfloat16)
    assert cache.shape == (3, 5, 4, 10)
    assert cache.dtype == torch.bfloat16
    num_bytes = cache.numel() * cache.element_size()
    assert num_bytes == 5 * block_bytes(CONFIG, block_size=4, dtype=torch.bfloat16)
    assert not cache.any()


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_tokens(num_tokens: int, expected: int) -> None:
    pool = BlockPool(10, 4)
    assert pool.blocks_for(num_tokens) == expected
    taken = pool.take(num_tokens)
    assert taken is not None
    assert len(taken) == expected
    assert pool.num_free == pool.num_usable - expected


def test_block_zero_is_never_given_away() -> None:
    pool = BlockPool(6, 4)
    assert pool.num_usable == 5
    taken = pool.take(20)
    assert taken is not None
    assert sorted(taken) == [1, 2, 3, 4, 5]
    assert pool.take(1) is None


def test_too_few_blocks_take_nothing() -> None:
    pool = BlockPool(4, 4)
    pool.take(5)
    assert pool.take(5) is None
    assert pool.num_free == 1
    assert pool.take(4) is not None


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_pool_without_usable_blocks(num_blocks: int) -> None:
    pool = BlockPool(num_blocks, 4)
    assert pool.num_usable == pool.num_free == 0
    assert pool.take(1) is None


def test_every_block_has_one_owner_at_any_time() -> None:
    draw = random.Random(4)
    pool = BlockPool(30, 4)
    owned: list[tuple[int, ...]] = []
    for _ in range(2000):
        if draw.random() < 0.55:
            blocks = pool.take(draw.randrange(1, 30))
            if blocks is not None:
                owned.append(blocks)
        elif owned:
            pool.give_back(owned.pop(draw.randrange(len(owned))))
        held = [block for blocks in owned for block in blocks]
        assert len(held) == len(set(held))
        assert set(held) <= set(range(1, 30))
        assert len(held) + pool.num_free == 29
    for blocks in owned:
        pool.give_back(blocks)
    assert sorted(pool.take(29 * 4) or ()) == list(range(1, 30))


def test_giving_back_twice_is_noticed_when_the_pool_is_full() -> None:
    pool = BlockPool(6, 4)
    blocks = pool.take(8)
    assert blocks is not None
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back(blocks)


def test_giving_back_twice_is_noticed_while_others_hold_blocks() -> None:
    pool = BlockPool(6, 4)
    first, second = pool.take(8), pool.take(8)
    assert first is not None
    assert second is not None
    pool.give_back(first)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back(first)
