"""The paged KV cache: a fixed number of blocks, allocated once. Who holds which is in `block_pool`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.core.errors import OptionError
from antiphon.models import ModelConfig

__all__ = ["CacheSize", "allocate_cache", "block_bytes"]


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
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # the last two: not even a size in 64 bits
        size = num_blocks * block_bytes(config, block_size=block_size, dtype=dtype)
        raise OptionError(
            f"a KV cache of {size} bytes cannot be allocated on this rank; use a lower kv_cache_memory "
            "(--kv-cache-memory), or a lower max_model_len (--max-model-len), if it is made for one text"
        ) from error
