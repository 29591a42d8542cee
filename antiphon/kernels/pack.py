"""Packing tokens into the rows that are sent, and adding up the partial sums that come back.

Shapes: `T` tokens, `D` hidden size, `K` experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from antiphon.kernels.dispatch import fused


@fused("pack", one_dtype=("x_out_TD", "x_TD"))
def pack_rows(
    x_out_TD: torch.Tensor,
    weights_out_TK: torch.Tensor,
    ids_out_TK: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> None:
    """Write hidden states, routing weights and expert ids into packed rows.

    The outputs are views with gaps between rows but not within them. Numbers are converted to the dtypes of the outputs
    (ids from int64 to int32).
    """
    x_out_TD.copy_(x_TD)
    weights_out_TK.copy_(weights_TK)
    ids_out_TK.copy_(ids_TK)


def add_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of all ranks' partial sums, which have one shape and dtype, in rank order; new.

    It is computed in float32 at least and rounded once, so all transports return the same numbers.
    """
    if len(parts) == 1:
        return parts[0].clone()
    if len(parts) == 2:  # every device adds two numbers in wider precision and rounds once
        return torch.add(*parts)
    return add_parts(*parts)


@fused("pack")
def add_parts(first_TD: torch.Tensor, *others_TD: torch.Tensor) -> torch.Tensor:
    """The sum of tensors of one shape and dtype in their order, in float32 at least, rounded once; new."""
    wide = first_TD.to(torch.promote_types(first_TD.dtype, torch.float32), copy=True)
    for part in others_TD:
        wide += part
    return wide.to(first_TD.dtype)
