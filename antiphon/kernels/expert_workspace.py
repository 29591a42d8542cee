"""Memory of the expert computation that is kept from call to call."""

from __future__ import annotations

import torch

__all__ = ["ExpertWorkspace"]


class ExpertWorkspace:
    """Buffers that only grow, for `grouped_experts` on a CUDA device; elsewhere it is not used.

    All lanes and all layers of a rank may share one: lanes queue their expert computation on the one compute stream, so
    a call's first kernel runs after the last kernel of the call before it, and nothing in here outlives a call: the
    result is the caller's. Computation on two streams needs a workspace each.

    max_pairs: (row, expert) pairs, local or not, that one pass handles; more rows take several passes over the weights.
    It bounds the memory: buffers are sized for the case that all of them are local.
    """

    def __init__(self, *, max_pairs: int = 262_144) -> None:
        self.max_pairs = max_pairs
        self._buffers: dict[str, torch.Tensor] = {}

    def get(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The first `size` numbers of a buffer, contents undefined; valid until the next `get` of that name."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < size or buffer.dtype != dtype or buffer.device != device:
            self._buffers.pop(name, None)
            del buffer  # before the larger one is allocated
            with torch.inference_mode(False):  # so that it can be used inside of it and outside
                buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size]

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
