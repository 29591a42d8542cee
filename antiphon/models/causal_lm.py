"""What the engine calls of a model, whatever its architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeAlias

import torch

LayerState: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]
"""Between two layers: what the last one adds [T, D], what it is to be added to [T, D] (`None` before the first layer),
cosines and sines [T, P]. All by tokens, so that it can be cut and joined; the next layer may write into it."""


class CausalLM(Protocol):
    """One rank's part of a language model: all of attention, this rank's experts.

    A call is `finish(run_layers(begin(...), range(num_layers)))`. Whoever calls the three may go on with the same
    tokens in other micro-batches between two layers.
    """

    @property
    def num_layers(self) -> int: ...

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, D] after the last norm, of the current micro-batch; writes its keys and values."""
        ...

    def begin(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> LayerState:
        """What comes before the first layer."""
        ...

    def run_layers(self, state: LayerState, layers: range) -> LayerState:
        """These layers, for the current micro-batch; writes its keys and values."""
        ...

    def finish(self, state: LayerState) -> torch.Tensor:
        """What comes behind the last layer: hidden states [T, D]."""
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
