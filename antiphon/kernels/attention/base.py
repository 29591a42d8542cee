"""The contract of attention backends: attention of decoding requests, and of prompts with context, over a paged cache.

A backend is made once for a model and shared by all its layers and lanes. It keeps no state between calls; whatever a
step needs is in the result of `prepare`.

    prepared = backend.prepare(block_table_NB, seq_lens_N)  # once per step and lane
    out_NHV = backend.decode(q_NHQ, cache_blocks, block_table_NB, seq_lens_N, prepared)  # once per layer

All work is queued on the current stream, and results are safe on that stream.

Shapes: `N` requests, `B` columns of the block table, `H` query heads, `G` key/value heads, `Q` numbers of a query or a
key, `V` numbers of a value, `S` new tokens of one request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """The sizes of one attention layer as its cache holds them.

    latent: the cache is [num_blocks, block_size, Q] with one row for all heads, and the first V numbers of a key are
    its value (absorbed multi-head latent attention). Otherwise it is [num_blocks, block_size, 2 * G * Q]: the keys of
    all key/value heads, then their values.
    """

    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    scale: float  # of the scores
    latent: bool

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def cache_width(self) -> int:
        """Numbers per token in the cache."""
        return self.key_size if self.latent else 2 * self.num_kv_heads * self.key_size


class AttentionBackend(ABC):
    """One way to compute attention over the paged cache; see the module docstring."""

    name: ClassVar[str]
    capturable: ClassVar[bool]
    """Whether `prepare` and `decode` may be captured in a CUDA graph.

    The host never waits, and all memory comes from torch's caching allocator."""
    batch_invariant: ClassVar[bool]
    """Whether the bits of a request's result depend neither on the other requests nor on the width of the table."""

    @classmethod
    @abstractmethod
    def refusal(cls, device: torch.device, shape: AttentionShape, dtype: torch.dtype, block_size: int) -> str | None:
        """Why this backend cannot be used, as a clause; `None` if it can."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.block_size = block_size
        self.device = device

    @property
    def capture_obstacle(self) -> str:
        """Why steps with this backend are not captured in CUDA graphs; "" if they are."""
        return "" if self.capturable else f"the attention backend {self.name} cannot be captured"

    def step_bytes(self, num_requests: int, width: int) -> int:
        """Scratch bytes of a step with this many decoding requests, besides its results; 0 if negligible.

        width: columns of the block table.
        """
        return 0

    @property
    def takes_context(self) -> bool:
        """Whether `attend_context` is to be called for a slice of several tokens with context."""
        return False

    @abstractmethod
    def prepare(self, block_table_NB: torch.Tensor, seq_lens_N: torch.Tensor) -> Any:
        """What all layers of one step share, as new tensors; for `decode` only.

        A capturable backend queues device work only. Replayed in a graph, it is right for new contents of the tensors.
        """

    @abstractmethod
    def decode(
        self,
        q_NHQ: torch.Tensor,
        cache_blocks: torch.Tensor,
        block_table_NB: torch.Tensor,
        seq_lens_N: torch.Tensor,
        prepared: Any,
    ) -> torch.Tensor:
        """Attention of one new token for each of `N` requests: [N, H, V], new.

        block_table_NB, seq_lens_N: int32. The lengths include the new token, whose keys and values are already in the
        cache; a length of 0 gives zeros. Columns of the table and cache contents past a length may hold anything.
        prepared: from `prepare` with the same tensors.
        """

    def attend_context(
        self, q_SHQ: torch.Tensor, cache_blocks: torch.Tensor, block_ids_B: torch.Tensor, length: int
    ) -> torch.Tensor:
        """Causal attention of the last `S` of `length` tokens of one request, all of them in the cache: [S, H, V], new.

        Only if `takes_context`.
        """
        raise NotImplementedError(f"{self.name} does not read context from the cache")
