"""The paged KV cache: a fixed number of blocks, allocated once, and the list of the free ones."""

from __future__ import annotations

import torch

from antiphon.models import ModelConfig

__all__ = ["BlockPool", "allocate_cache", "num_blocks_for"]


def num_blocks_for(config: ModelConfig, *, block_size: int, memory_bytes: int, dtype: torch.dtype) -> int:
    """Blocks that fit into `memory_bytes` on one rank."""
    block_bytes = config.num_layers * block_size * config.kv_width * dtype.itemsize
    return memory_bytes // block_bytes


def allocate_cache(config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """[layers, num_blocks, block_size, kv_width], zeros. It never grows."""
    return torch.zeros(config.num_layers, num_blocks, block_size, config.kv_width, dtype=dtype)


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
