"""From grouped-query attention's merged projection to queries, and keys and values in the paged cache.

The fused twin does the norms, the rotary embedding and the cache write in one pass.

Shapes: `T` tokens, `H` query heads, `G` key/value heads, `Q` dimensions of a head, `P` pairs of rotary dimensions (the
first 2P of a head), `X` = (H + 2G)Q: the queries of a token, then its keys, then its values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from antiphon.kernels.dispatch import fused
from antiphon.kernels.gqa_attention import write_keys_values
from antiphon.kernels.norm_rope import apply_rope, rms_norm


class HeadNorms(NamedTuple):
    """The RMS norms applied to each head of the queries and keys."""

    q_weight_Q: torch.Tensor
    k_weight_Q: torch.Tensor
    eps: float


@fused("gqa_write", one_dtype=("qkv_TX", "cos_TP", "sin_TP", "cache_blocks"))
def norm_rotate_write(
    qkv_TX: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    cache_blocks: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    num_kv_heads: int,
    head_size: int,
    norms: HeadNorms | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, H, Q], keys and values [T, G, Q], ready for attention; also writes keys and values to the cache.

    The results may be views of `qkv_TX`, whose contents are overwritten. norms: applied before the rotation, with the
    rounding of `rms_norm`; None if there are none. Rotated pairs are (x0, xP), (x1, xP+1), ...
    cache_blocks: [num_blocks, block_size, 2GQ], contiguous.
    slots_T: int64, block * block_size + offset, all distinct except those in block 0.
    """
    num_heads = qkv_TX.shape[1] // head_size - 2 * num_kv_heads
    heads_TXQ = torch.unflatten(qkv_TX, 1, (-1, head_size))
    q_THQ, key_TGQ, value_TGQ = torch.split(heads_TXQ, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q_THQ = rms_norm.reference(q_THQ, norms.q_weight_Q, norms.eps)
        key_TGQ = rms_norm.reference(key_TGQ, norms.k_weight_Q, norms.eps)
    for x_TXQ in (q_THQ, key_TGQ):
        rotary = x_TXQ[..., : 2 * cos_TP.shape[1]]
        apply_rope.reference(rotary, cos_TP, sin_TP, interleaved=False, out=rotary)
    write_keys_values(cache_blocks, slots_T, key_TGQ, value_TGQ)
    return q_THQ, key_TGQ, value_TGQ
