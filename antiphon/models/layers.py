"""Layers without communication: linear, norm, gated feed-forward.

Weights are uninitialized until the checkpoint fills them. Parameters are named as in Hugging Face checkpoints, except
in modules that merge several of a checkpoint's tensors (`InParts`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from antiphon.kernels.activation import gated_silu
from antiphon.kernels.norm_rope import add_rms_norm, rms_norm


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialized weight that is never trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


@runtime_checkable
class InParts(Protocol):
    """A module whose tensors have different names or shapes in a checkpoint."""

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint names and the views that they fill. prefix: that of the parent module."""
        ...


def checkpoint_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Checkpoint names of everything in `module`, whose own name is `prefix`, and the tensors that they fill."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield prefix + name, tensor
    for name, child in module.named_children():
        if isinstance(child, InParts):
            yield from child.checkpoint_tensors(prefix)
        else:
            yield from checkpoint_tensors(child, f"{prefix}{name}.")


class Linear(nn.Module):
    """`x @ weight.T + bias`; weight [out, in]."""

    def __init__(self, in_size: int, out_size: int, *, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(out_size, in_size, dtype=dtype)
        self.bias = parameter(out_size, dtype=dtype) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class MergedLinear(nn.Module):
    """Several linear layers over the same input as one GEMM, with their outputs side by side.

    sizes: the output size of each layer, by its name in the checkpoint. with_bias: names of the layers with a bias.
    """

    def __init__(
        self, in_size: int, sizes: dict[str, int], *, dtype: torch.dtype, with_bias: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.sizes = list(sizes.values())
        self.rows = {
            name: slice(*edges) for name, edges in zip(sizes, pairwise(accumulate(self.sizes, initial=0)), strict=True)
        }
        self.names_with_bias = frozenset(with_bias)
        self.weight = parameter(sum(self.sizes), in_size, dtype=dtype)
        self.bias = parameter(sum(self.sizes), dtype=dtype).zero_() if with_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All outputs, [..., sum of sizes]."""
        return F.linear(x, self.weight, self.bias)

    def split(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output of each layer: views."""
        return torch.split(out, self.sizes, dim=-1)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, rows in self.rows.items():
            yield f"{prefix}{name}.weight", self.weight[rows]
            if self.bias is not None and name in self.names_with_bias:
                yield f"{prefix}{name}.bias", self.bias[rows]


class Embedding(nn.Module):
    """Token ids [T] to hidden states [T, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, hidden_size, dtype=dtype)

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids_T, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight per dimension; see `kernels.norm_rope`."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, more_TD: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `residual + (x + more)`, and the sum itself, which may reuse the residual's memory."""
        return add_rms_norm(x_TD, residual_TD, self.weight, self.eps, more_TD=more_TD)


class GatedFeedForward(nn.Module):
    """`down(silu(gate x) * up x)`: the dense layers and the shared experts."""

    def __init__(self, hidden_size: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(hidden_size, {"gate_proj": width, "up_proj": width}, dtype=dtype)
        self.down_proj = Linear(width, hidden_size, dtype=dtype)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj.forward(gated_silu(self.gate_up_proj.forward(x_TD)))
