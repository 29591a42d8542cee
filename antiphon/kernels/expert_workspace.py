"""Memory of the expert computation that is kept from call to call."""

from __future__ import annotations

import math

import torch

_MAX_VIEWS = 1024


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
        self._views: dict[tuple[object, ...], tuple[torch.Tensor, ...]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The first numbers of a buffer, contents undefined; valid until the next `get` of that name."""
        return self.get_shared(name, (shape,), dtype, device)[0]

    def get_shared(
        self, name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """Several views of the same memory; for one tensor after the other."""
        key = (name, shapes, dtype, device)
        views = self._views.get(key)
        if views is None:
            with torch.inference_mode(False):  # so that they can be used inside of it and outside
                buffer = self._buffer(name, max(map(math.prod, shapes)), dtype, device)
                views = tuple(buffer[: math.prod(shape)].view(shape) for shape in shapes)
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = views
        return views

    def _buffer(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < size or buffer.dtype != dtype or buffer.device != device:
            self._buffers.pop(name, None)
            self._views.clear()  # they hold the memory
            del buffer  # before the larger one is allocated
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return buffer

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
