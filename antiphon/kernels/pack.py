"""Packing of tokens into the rows that travel.

Shapes: `T` tokens, `D` hidden size, `K` experts per token.
"""

from __future__ import annotations

import torch

__all__ = ["pack_rows"]


def pack_rows(
    x_out_TD: torch.Tensor,
    weights_out_TK: torch.Tensor,
    ids_out_TK: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> None:
    """Write hidden states, routing weights and expert ids into views of packed rows, whose strides have gaps.

    ids_out_TK: int32; ids_TK: any integers.
    """
    x_out_TD.copy_(x_TD)
    weights_out_TK.copy_(weights_TK)
    ids_out_TK.copy_(ids_TK)
