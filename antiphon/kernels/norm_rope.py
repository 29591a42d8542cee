"""RMS norm and rotary embedding. On a CUDA device each is one pass over memory.

Shapes: `T` tokens, `D` hidden size, `H` heads, `P` half of the rotary dimensions.
"""

from __future__ import annotations

import torch

from antiphon.kernels.slow import warn_of_reference


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 at least; result in x's dtype.

    x_TD: [T, D] or [T, H, D]; may be a view with gaps between its rows. The result is new and contiguous.
    """
    if x_TD.is_cuda and weight_D.dtype == x_TD.dtype:
        from antiphon.kernels.fused.norm_rope import rms_norm_fused  # Triton comes with CUDA only

        return rms_norm_fused(x_TD, weight_D, eps)
    if x_TD.is_cuda:
        warn_of_reference("rms_norm", x_TD, weight_D)
    return rms_norm_reference(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rms_norm(residual + x), residual + x)`: both [T, D], in x's dtype; the sum is rounded before the norm.

    The norm is new; the sum may be in the memory of `residual_TD`, so that is not to be used any more.
    """
    if x_TD.is_cuda and x_TD.dtype == residual_TD.dtype == weight_D.dtype:
        from antiphon.kernels.fused.norm_rope import add_rms_norm_fused  # Triton comes with CUDA only

        return add_rms_norm_fused(x_TD, residual_TD, weight_D, eps)
    if x_TD.is_cuda:
        warn_of_reference("add_rms_norm", x_TD, residual_TD, weight_D)
    return add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)


def apply_rope(
    x: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, *, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate `x` [T, 2P] or [T, H, 2P] by the angle of each position.

    interleaved: pairs are (x0, x1), (x2, x3), ... as DeepSeek stores them; else (x0, xP), (x1, xP+1), ...
    The result has all first members of the pairs in front of all second ones, in both cases.
    It is written into `out` if that is given, which may be `x` itself, else new. x and out may be views with gaps
    between heads and tokens.
    """
    if x.is_cuda and x.dtype == cos_TP.dtype == sin_TP.dtype:
        from antiphon.kernels.fused.norm_rope import apply_rope_fused  # Triton comes with CUDA only

        return apply_rope_fused(x, cos_TP, sin_TP, interleaved=interleaved, out=out)
    if x.is_cuda:
        warn_of_reference("apply_rope", x, cos_TP, sin_TP)
    rotated = apply_rope_reference(x, cos_TP, sin_TP, interleaved=interleaved)
    return rotated if out is None else out.copy_(rotated)


def rms_norm_reference(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in plain torch."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x = x_TD.to(wide)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


def add_rms_norm_reference(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    sum_TD = residual_TD + x_TD
    return rms_norm_reference(sum_TD, weight_D, eps), sum_TD


def apply_rope_reference(
    x: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """The same in plain torch; always new."""
    if x.dim() == 3:
        cos_TP, sin_TP = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cos_TP - second * sin_TP, second * cos_TP + first * sin_TP], dim=-1)
