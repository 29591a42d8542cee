"""Causal attention of the last tokens of a sequence: by one of torch's fused kernels if possible, else in pieces.

Without context, all of torch's kernels apply a causal mask without a mask tensor. With context only the flash kernel
does, through an operator of its own. `torch.nn.attention.bias` calls the same operator, but it imports torch's compiler
(a second or more in the middle of serving) and allocates host memory for the whole mask.

Shapes: `N` sequences, `H` query heads, `G` key/value heads, `S` new tokens, `L` tokens of context and new ones, `Q`
dimensions of queries and keys, `V` of values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from antiphon.core.warn_once import warn_once
from antiphon.kernels.dispatch import takes_cuda_kernels

_MOST_MASKED = 1 << 22
"""Elements of the mask of one piece, and of its scores per head where these are materialized."""

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_ALIGNMENT = 8  # the head dimension must be a multiple of it


def causal_attention(
    q_NHSQ: torch.Tensor, key_NGLQ: torch.Tensor, value_NGLV: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of the last `S` of `L` tokens: [N, H, S, V]. The host does not wait.

    Query head h uses key/value head h // (H / G).
    """
    if q_NHSQ.shape[2] == key_NGLQ.shape[2]:
        return _attend(q_NHSQ, key_NGLQ, value_NGLV, None, scale)
    if _takes_flash(q_NHSQ, key_NGLQ, value_NGLV):
        # This kernel's causal mask is aligned to the lower right corner.
        out_NHSV: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            q_NHSQ, key_NGLQ, value_NGLV, 0.0, is_causal=True, return_debug_mask=False, scale=scale
        )[0]
        return out_NHSV
    if takes_cuda_kernels(q_NHSQ):
        _warn_of_pieces(q_NHSQ.dtype, q_NHSQ.shape[3])
    return causal_attention_reference(q_NHSQ, key_NGLQ, value_NGLV, scale)


def causal_attention_reference(
    q_NHSQ: torch.Tensor,
    key_NGLQ: torch.Tensor,
    value_NGLV: torch.Tensor,
    scale: float,
    *,
    most_masked: int = _MOST_MASKED,
) -> torch.Tensor:
    """`causal_attention` with explicit masks, a piece of the new tokens at a time, for any device and dtype."""
    num_new, length = q_NHSQ.shape[2], key_NGLQ.shape[2]
    context, step = length - num_new, max(1, most_masked // length)
    pieces = []
    for start in range(0, num_new, step):
        stop = min(start + step, num_new)
        seen = context + stop
        mask = torch.ones(stop - start, seen, dtype=torch.bool, device=q_NHSQ.device).tril_(context + start)
        q_NHsQ, key_NGlQ, value_NGlV = q_NHSQ[:, :, start:stop], key_NGLQ[:, :, :seen], value_NGLV[:, :, :seen]
        pieces.append(_attend(q_NHsQ, key_NGlQ, value_NGlV, mask, scale))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _warn_of_pieces(dtype: torch.dtype, head_size: int) -> None:
    kind = str(dtype).removeprefix("torch.")
    other = "a GPU of compute capability 8 or later, and a head dimension that is a multiple of 8 and at most 256"
    warn_once(
        f"attention of prompts with context runs in pieces on a GPU, because torch's flash kernel does not support "
        f"head dimension {head_size} in {kind} here",
        cost="masks are materialized, and the kernels are slower and more numerous",
        remedy=f"use {other if dtype in _FLASH_DTYPES else 'bfloat16 where speed matters'}",
    )


def _attend(
    q_NHSQ: torch.Tensor,
    key_NGLQ: torch.Tensor,
    value_NGLV: torch.Tensor,
    mask_SL: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q_NHSQ,
        key_NGLQ,
        value_NGLV,
        attn_mask=mask_SL,
        is_causal=mask_SL is None,
        scale=scale,
        enable_gqa=_is_grouped(q_NHSQ, key_NGLQ),
    )


def _is_grouped(q_NHSQ: torch.Tensor, key_NGLQ: torch.Tensor) -> bool:
    return q_NHSQ.shape[1] != key_NGLQ.shape[1]


def _takes_flash(q_NHSQ: torch.Tensor, key_NGLQ: torch.Tensor, value_NGLV: torch.Tensor) -> bool:
    if not takes_cuda_kernels(q_NHSQ) or q_NHSQ.dtype not in _FLASH_DTYPES or q_NHSQ.shape[3] % _FLASH_ALIGNMENT:
        return False
    # We check without a mask: torch's own causal mask, aligned to the upper left corner, is refused with a context.
    grouped = _is_grouped(q_NHSQ, key_NGLQ)
    return can_use_flash_attention(SDPAParams(q_NHSQ, key_NGLQ, value_NGLV, None, 0.0, False, grouped))
