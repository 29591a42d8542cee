"""The paged KV cache: a fixed number of blocks, allocated once, and the list of the free ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.core.errors import OptionError
from antiphon.models import ModelConfig

__all__ = ["BlockPool", "CacheSize", "allocate_cache", "block_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Blocks of one rank, equal on all of them, and in words why so many. Block 0 is among them."""

    num_blocks: int
    source: str


def block_bytes(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block, all layers together."""
    return config.num_layers * block_size * config.kv_width * dtype.itemsize


def allocate_cache(
    config: ModelConfig,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """[layers, num_blocks, block_size, kv_width], zeros, by default on the CPU. It never grows."""
    try:
        return torch.zeros(config.num_layers, num_blocks, block_size, config.kv_width, dtype=dtype, device=device)
    except RuntimeError as error:
        size = num_blocks * block_bytes(config, block_size=block_size, dtype=dtype)
        raise OptionError(f"kv_cache_memory: {size} bytes cannot be allocated on this rank; use less") from error


class BlockPool:
    """Which blocks are free. Block 0 is never given away: tables are padded with it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, 0, -1))
        self._taken: set[int] = set()
        self.num_usable = len(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take(self, num_tokens: int) -> tuple[int, ...] | None:
        """Blocks for `num_tokens` tokens, or `None` if there are not enough."""
        needed = self.blocks_for(num_tokens)
        if needed > len(self._free):
            return None
        blocks = tuple(self._free.pop() for _ in range(needed))
        self._taken.update(blocks)
        return blocks

    def give_back(self, block_ids: tuple[int, ...]) -> None:
        assert self._taken.issuperset(block_ids), "a block was given back twice"
        self._taken.difference_update(block_ids)
        self._free.extend(reversed(block_ids))
