"""The activation of gated feed-forward layers.

Shapes: `X` rows, `F` width, `G` = 2F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from antiphon.kernels.dispatch import fused


@fused("activation")
def gated_silu(gate_up_XG: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, where the gate is the first half of each row: [X, F], new.

    The fused twin rounds once; the reference rounds after each operation.
    """
    gate_XF, up_XF = gate_up_XG.chunk(2, dim=-1)
    return F.silu(gate_XF) * up_XF
