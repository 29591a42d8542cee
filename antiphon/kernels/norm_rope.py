"""RMS norm and rotary embedding; each fused twin takes one pass over memory.

Shapes: `T` tokens, `D` hidden size, `H` heads, `P` half of the rotary dimensions.
"""

from __future__ import annotations

import torch

from antiphon.kernels.dispatch import fused


@fused("norm_rope", one_dtype=("x_TD", "weight_D"))
def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in x's dtype but computed in float32 at least.

    x_TD: [T, D] or [T, H, D]; may be a view with gaps between its rows. The result is new and contiguous.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x = x_TD.to(wide)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


@fused("norm_rope", one_dtype=("x_TD", "residual_TD", "weight_D"))
def add_rms_norm(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    more_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rms_norm(residual + x), residual + x)`: both [T, D], in x's dtype; the sum is rounded before the norm.

    more_TD: added to x first, in x's dtype, with a rounding of its own.
    The norm is new. The sum may reuse the memory of `residual_TD`, which the caller must not use afterwards.
    """
    sum_TD = residual_TD + (x_TD if more_TD is None else x_TD + more_TD)
    return rms_norm.reference(sum_TD, weight_D, eps), sum_TD


@fused("norm_rope", one_dtype=("x", "cos_TP", "sin_TP"))
def apply_rope(
    x: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate `x` [T, 2P] or [T, H, 2P] by the angle of each position.

    interleaved: pairs are (x0, x1), (x2, x3), ... as DeepSeek stores them; else (x0, xP), (x1, xP+1), ...
    In both cases the first members of all pairs come before the second ones in the result.
    It is written to `out` if given, which may be `x` itself; else it is new. x and out may be views with gaps
    between heads and tokens.
    """
    if x.dim() == 3:
        cos_TP, sin_TP = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    rotated = torch.cat([first * cos_TP - second * sin_TP, second * cos_TP + first * sin_TP], dim=-1)
    return rotated if out is None else out.copy_(rotated)
