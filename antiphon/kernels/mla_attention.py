"""Multi-head latent attention over a paged cache of latents.

The cache keeps, for every token and layer, one latent of `C` numbers and one rotary key of `P2` numbers, side by
side: [num_blocks, block_size, C + P2]. A slice of several tokens expands the latents of its whole context to keys
and values (`prefill_attention`). A slice of one token folds the expansion into query and output instead and attends
to the latents themselves (`decode_attention`, "absorbed"; DeepSeek-V2 paper, section 2.1).

Shapes: `S` new tokens, `L` tokens of context and new ones, `N` requests, `B` blocks, `H` heads, `C` latent size,
`P2` rotary dimensions, `Q` dimensions without rotary, `V` value dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["decode_attention", "gather_blocks", "prefill_attention", "write_latents"]

_FUSED_DTYPES = (torch.bfloat16, torch.float16)


def write_latents(cache_blocks: torch.Tensor, slots_T: torch.Tensor, latent_TC: torch.Tensor) -> None:
    """Put the latents (with rotary key) of `T` tokens into the cache at `slots_T` = block * block_size + offset."""
    cache_blocks.flatten(0, 1).index_copy_(0, slots_T, latent_TC)


def gather_blocks(cache_blocks: torch.Tensor, block_ids_B: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` latents of one request: [length, C + P2], new."""
    return cache_blocks[block_ids_B].flatten(0, 1)[:length]


def prefill_attention(
    q_SHQ: torch.Tensor,
    latents_LC: torch.Tensor,
    key_up_HQC: torch.Tensor,
    value_up_HVC: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of the last `S` of `L` tokens of one request: [S, H, V].

    q_SHQ: [S, H, Q + P2], rotary part behind. latents_LC: [L, C + P2] of all `L` tokens.
    """
    num_heads = q_SHQ.shape[1]
    latent_size = key_up_HQC.shape[2]
    latent_LC, rope_key_LP = latents_LC[:, :latent_size], latents_LC[:, latent_size:]
    key_HLQ = torch.matmul(latent_LC, key_up_HQC.transpose(1, 2))
    value_HLV = torch.matmul(latent_LC, value_up_HVC.transpose(1, 2))
    key_HLQ = torch.cat([key_HLQ, rope_key_LP.expand(num_heads, -1, -1)], dim=-1)
    fused = q_SHQ.is_cuda and q_SHQ.dtype in _FUSED_DTYPES and value_up_HVC.shape[1] <= q_SHQ.shape[2]
    attention = _causal_fused if fused else _causal
    return attention(q_SHQ.transpose(0, 1), key_HLQ, value_HLV, scale).transpose(0, 1)


def _causal(q_HSQ: torch.Tensor, key_HLQ: torch.Tensor, value_HLV: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of the last `S` of `L` tokens: [H, S, V]. Any device and dtype; on CUDA devices scores are stored."""
    num_new, length = q_HSQ.shape[1], key_HLQ.shape[1]
    context = length - num_new
    if context == 0:
        mask = None
    else:
        mask = torch.ones(num_new, length, dtype=torch.bool, device=q_HSQ.device).tril(context)
    return F.scaled_dot_product_attention(
        q_HSQ, key_HLQ, value_HLV, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def _causal_fused(q_HSQ: torch.Tensor, key_HLQ: torch.Tensor, value_HLV: torch.Tensor, scale: float) -> torch.Tensor:
    """The same without storing scores or masks.

    torch's flash kernels want values as long as keys, four dimensions, and no mask but this one.
    """
    value_size = value_HLV.shape[2]
    padded_HLQ = F.pad(value_HLV, (0, key_HLQ.shape[2] - value_size))
    num_new, length = q_HSQ.shape[1], key_HLQ.shape[1]
    mask = None
    if num_new < length:
        from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler with it: a second of a start

        mask = causal_lower_right(num_new, length)
    out_BHSQ = F.scaled_dot_product_attention(
        q_HSQ.unsqueeze(0),
        key_HLQ.unsqueeze(0),
        padded_HLQ.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out_BHSQ[0, :, :, :value_size]


def decode_attention(
    q_NHQ: torch.Tensor,
    cache_blocks: torch.Tensor,
    block_table_NB: torch.Tensor,
    seq_lens_N: torch.Tensor,
    key_up_HQC: torch.Tensor,
    value_up_HVC: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one new token for each of `N` requests, in latent space: [N, H, V].

    q_NHQ: [N, H, Q + P2]. seq_lens_N counts the new token, whose latent is in the cache already.
    """
    query_size, latent_size = key_up_HQC.shape[1], key_up_HQC.shape[2]
    wide = torch.promote_types(q_NHQ.dtype, torch.float32)
    latents_NLC = cache_blocks[block_table_NB].flatten(1, 2)
    latent_q_NHC = torch.einsum("nhq,hqc->nhc", q_NHQ[..., :query_size], key_up_HQC)
    full_q_NHC = torch.cat([latent_q_NHC, q_NHQ[..., query_size:]], dim=-1)
    scores_NHL = torch.matmul(full_q_NHC, latents_NLC.transpose(1, 2)) * scale
    hidden_NL = torch.arange(latents_NLC.shape[1], device=q_NHQ.device) >= seq_lens_N.unsqueeze(1)
    scores_NHL = scores_NHL.masked_fill(hidden_NL.unsqueeze(1), float("-inf"))
    weights_NHL = scores_NHL.softmax(dim=-1, dtype=wide).to(q_NHQ.dtype)
    # Unused blocks may hold anything, infinities too: 0 * inf would be nan.
    latents_NLC = latents_NLC[..., :latent_size].masked_fill(hidden_NL.unsqueeze(2), 0)
    context_NHC = torch.matmul(weights_NHL, latents_NLC)
    return torch.einsum("nhc,hvc->nhv", context_NHC, value_up_HVC)
