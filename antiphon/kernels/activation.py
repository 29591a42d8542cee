"""The activation of gated feed-forward layers.

Shapes: `X` rows, `F` width, `G` = 2F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gated_silu(gate_up_XG: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, gate in the first half of a row: [X, F], new. On a CUDA device one pass, rounded once."""
    if gate_up_XG.is_cuda:
        from antiphon.kernels.fused.activation import gated_silu_fused  # Triton comes with CUDA only

        return gated_silu_fused(gate_up_XG)
    return gated_silu_reference(gate_up_XG)


def gated_silu_reference(gate_up_XG: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    gate_XF, up_XF = gate_up_XG.chunk(2, dim=-1)
    return F.silu(gate_XF) * up_XF
