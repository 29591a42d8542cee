"""The size of the KV cache: how many blocks a rank has, and what one block takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.models import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Blocks of one rank, equal on all of them, and the reason for their number in words. Block 0 is one of them."""

    num_blocks: int
    source: str


def block_bytes(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block, all layers together."""
    return config.num_layers * block_size * config.kv_width * dtype.itemsize
