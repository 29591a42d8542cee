"""Layers without communication: linear, norm, gated feed-forward.

Weights are left uninitialised: the checkpoint fills them. Parameter names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from antiphon.kernels.norm_rope import rms_norm

__all__ = ["Embedding", "GatedFeedForward", "Linear", "RMSNorm", "parameter"]


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised weight that is never trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """`x @ weight.T + bias`; weight [out, in]."""

    def __init__(self, in_size: int, out_size: int, *, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(out_size, in_size, dtype=dtype)
        self.bias = parameter(out_size, dtype=dtype) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids [T] to hidden states [T, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, hidden_size, dtype=dtype)

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids_T, self.weight)


class RMSNorm(nn.Module):
    """See `kernels.norm_rope.rms_norm`."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedFeedForward(nn.Module):
    """`down(silu(gate x) * up x)`: the dense layers and the shared experts."""

    def __init__(self, hidden_size: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, dtype=dtype)
        self.up_proj = Linear(hidden_size, width, dtype=dtype)
        self.down_proj = Linear(width, hidden_size, dtype=dtype)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return out_TD
