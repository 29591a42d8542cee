"""The interface through which the engine calls a model of any architecture, and what one lane runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from antiphon.core.batch import MicroBatch, use_micro_batch

LayerState: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]
"""The state between two layers: the output of the last one [T, D], the residual that it has yet to be added to [T, D]
(`None` before the first layer), cosines and sines [T, P]. Every tensor has one row per token, so the state can be cut
and joined; the next layer may write into it."""


class CausalLM(Protocol):
    """One rank's part of a language model: all of the attention, and this rank's experts.

    Calling the model is `finish(run_layers(begin(...), range(num_layers)))`. A caller of the three parts may cut the
    tokens into other micro-batches between two layers.
    """

    @property
    def num_layers(self) -> int: ...

    @property
    def capture_obstacle(self) -> str:
        """Why a step of this model cannot be captured in a CUDA graph on its device; "" if it can."""
        ...

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, D] of the current micro-batch after the last norm; writes its keys and values."""
        ...

    def prepare(self, part: MicroBatch) -> MicroBatch:
        """The micro-batch with what its layers share in attention; itself if there is nothing. Once a step and lane."""
        ...

    def begin(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> LayerState:
        """The state before the first layer."""
        ...

    def run_layers(self, state: LayerState, layers: range) -> LayerState:
        """The state after these layers, for the current micro-batch; writes its keys and values."""
        ...

    def finish(self, state: LayerState) -> torch.Tensor:
        """Hidden states [T, D] from the state after the last layer."""
        ...

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] in float32 at least."""
        ...

    def best_tokens(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The token with the largest logit of each row: int64 [N]. The lowest of equally good ones."""
        ...

    def prepare_experts(self, num_rows: int, agree: Callable[[int], Sequence[int]]) -> str:
        """Measure which kernels compute the experts, and size their memory for `num_rows` rows. The choice, in words.

        Call it with the weights loaded, before `freeze`. Does nothing on devices without a choice. agree: returns what
        every rank has measured, so that all choose alike.
        """
        ...

    def decode_bytes(self, num_requests: int, width: int) -> int:
        """Scratch bytes of attention in a step with this many decoding requests, besides what prompts need.

        width: blocks of the longest text.
        """
        ...

    def freeze(self) -> None:
        """Keep memory that captured steps use where it is from now on."""
        ...

    def bind_kv_cache(self, cache_by_layer: torch.Tensor) -> None:
        """Give every layer its part of a cache of shape [layers, num_blocks, block_size, kv_width]."""
        ...

    def checkpoint_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint names of everything that this rank reads, and the tensors or views that they fill."""
        ...


def run_micro_batch(model: CausalLM, part: MicroBatch, layers: range | None = None, state: Any = None) -> Any:
    """Run `part` through the model, or through some of its layers, as one lane does.

    layers: all by default. state: the `LayerState` before the first of them; `None` begins with the embedding.
    Returns hidden states [T, D] if the last layer is among them, else the `LayerState` after these layers.
    """
    with use_micro_batch(model.prepare(part)):
        if layers is None:
            return model(part.token_ids_T, part.positions_T)
        state = model.begin(part.token_ids_T, part.positions_T) if state is None else state
        state = model.run_layers(state, layers)
        return model.finish(state) if layers.stop == model.num_layers else state
