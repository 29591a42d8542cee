"""What the engine calls of a model, whatever its architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

__all__ = ["CausalLM"]


class CausalLM(Protocol):
    """One rank's part of a language model: all of attention, this rank's experts."""

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, D] after the last norm, of the current micro-batch; writes its keys and values."""
        ...

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, V] in float32 at least."""
        ...

    def bind_kv_cache(self, cache_by_layer: torch.Tensor) -> None:
        """Give every layer its part of the cache [layers, num_blocks, block_size, kv_width]."""
        ...

    def checkpoint_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint names of everything that this rank reads, and the tensors or views that they fill."""
        ...
