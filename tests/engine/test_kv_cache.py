"""The KV cache: how many blocks fit, and their memory."""

from __future__ import annotations

import pytest
import torch

from antiphon.config.cache import block_bytes
from antiphon.engine.cache.kv_cache import allocate_cache
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
