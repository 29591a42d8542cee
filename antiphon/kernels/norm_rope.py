"""RMS norm and rotary embedding.

Shapes: `T` tokens, `D` hidden size, `H` heads, `P` half of the rotary dimensions.
"""

from __future__ import annotations

import torch

__all__ = ["apply_rope", "rms_norm"]


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 at least; result in x's dtype."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x = x_TD.to(wide)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


def apply_rope(x: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate `x` [T, 2P] or [T, H, 2P] by the angle of each position.

    interleaved: pairs are (x0, x1), (x2, x3), ... as DeepSeek stores them; else (x0, xP), (x1, xP+1), ...
    The result has all first members of the pairs in front of all second ones, in both cases.
    """
    if x.dim() == 3:
        cos_TP, sin_TP = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cos_TP - second * sin_TP, second * cos_TP + first * sin_TP], dim=-1)
