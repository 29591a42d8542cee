"""The size of the KV cache: the number of blocks on a rank, and the size of one block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.models import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Number of blocks on each rank, block 0 included, and the reason for it in words."""

    num_blocks: int
    source: str


def block_bytes(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Size of one block across all layers, in bytes."""
    return config.num_layers * block_size * config.kv_width * dtype.itemsize
