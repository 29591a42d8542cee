"""How a token gets into the row that it travels in: hidden state, routing weights and expert ids.

Shapes: `T` tokens, `D` hidden size, `K` experts per token.
"""

from __future__ import annotations

import torch

from antiphon.kernels.slow import warn_of_reference


def pack_rows(
    x_out_TD: torch.Tensor,
    weights_out_TK: torch.Tensor,
    ids_out_TK: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> None:
    """Write tokens, weights and ids into the parts of packed rows, which are views with gaps; one launch on CUDA.

    Numbers are converted to the dtypes of the outputs: ids from int64 to int32. Rows need no gaps between numbers.
    """
    if x_TD.is_cuda and x_TD.dtype == x_out_TD.dtype:
        from antiphon.kernels.fused.pack import pack_rows_fused  # Triton comes with CUDA only

        pack_rows_fused(x_out_TD, weights_out_TK, ids_out_TK, x_TD, weights_TK, ids_TK)
    else:
        if x_TD.is_cuda:
            warn_of_reference("pack_rows", x_TD, x_out_TD)
        pack_rows_reference(x_out_TD, weights_out_TK, ids_out_TK, x_TD, weights_TK, ids_TK)


def pack_rows_reference(
    x_out_TD: torch.Tensor,
    weights_out_TK: torch.Tensor,
    ids_out_TK: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> None:
    """The same in plain torch."""
    x_out_TD.copy_(x_TD)
    weights_out_TK.copy_(weights_TK)
    ids_out_TK.copy_(ids_TK)
