"""The paged KV cache: a fixed number of blocks, allocated once. Who holds which is in `block_pool`."""

from __future__ import annotations

import torch

from antiphon.config.cache import block_bytes
from antiphon.core.errors import OptionError
from antiphon.models import ModelConfig


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
