"""Multi-head latent attention over a paged cache of latents.

For every token and layer, the cache holds one latent of `C` numbers and one rotary key of `P2` numbers, side by
side: [num_blocks, block_size, C + P2]. A slice of several tokens expands the latents of its whole context to keys
and values (`prefill_attention`). A slice of one token folds the expansion into query and output instead and attends
to the latents themselves (`decode_attention`, "absorbed"; DeepSeek-V2 paper, section 2.1).

Shapes: `S` new tokens, `L` tokens of context and new ones, `N` requests, `B` blocks, `H` heads, `C` latent size,
`P2` rotary dimensions, `Q` dimensions without rotary, `V` value dimensions.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from antiphon.core.warn_once import warn_once
from antiphon.kernels.causal_attention import causal_attention
from antiphon.kernels.dispatch import takes_cuda_kernels
from antiphon.kernels.paged_cache import MOST_POSITIONS, attend_to_cached, decode_in_groups

MOST_EXPANDED = 1 << 20
"""Heads times positions that are expanded at once: 1.25 GiB of keys and values in bfloat16 at DeepSeek's sizes, padded.

That is 8,192 tokens of 128 heads, so prompts without context are computed in one piece.
"""

_FUSED_DTYPES = (torch.bfloat16, torch.float16)


def write_latents(cache_blocks: torch.Tensor, slots_T: torch.Tensor, latent_TC: torch.Tensor) -> None:
    """Write the latents (with rotary key) of `T` tokens to the cache at `slots_T` = block * block_size + offset."""
    cache_blocks.flatten(0, 1).index_copy_(0, slots_T, latent_TC)


def prefill_attention(
    q_NSHQ: torch.Tensor,
    latents_NLC: torch.Tensor,
    up_HXC: torch.Tensor,
    scale: float,
    *,
    most_expanded: int = MOST_EXPANDED,
) -> torch.Tensor:
    """Causal attention of the last `S` of `L` tokens of `N` requests: [N, S, H, V].

    q_NSHQ: [N, S, H, Q + P2], rotary part last. latents_NLC: [N, L, C + P2].
    up_HXC: [H, Q + V, C], from a latent to the key and the value of each head, contiguous.
    most_expanded bounds the keys and values that exist at once, by computing a long context a few heads at a time.
    """
    groups = _head_groups(up_HXC.shape[0], latents_NLC.shape[0] * latents_NLC.shape[1], most_expanded)
    parts = [_prefill(q_NSHQ[:, :, heads], latents_NLC, up_HXC[heads], scale) for heads in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _head_groups(num_heads: int, num_positions: int, most_expanded: int) -> list[slice]:
    """Slices of at least one head each, as few and as even as possible."""
    at_most = max(1, most_expanded // max(1, num_positions))
    num_groups = -(-num_heads // at_most)
    edges = [num_heads * number // num_groups for number in range(num_groups + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _prefill(q_NSHQ: torch.Tensor, latents_NLC: torch.Tensor, up_HXC: torch.Tensor, scale: float) -> torch.Tensor:
    num_heads, _, latent_size = up_HXC.shape
    num_requests, length, width = latents_NLC.shape
    query_size = q_NSHQ.shape[3] - (width - latent_size)
    expanded = F.linear(latents_NLC.flatten(0, 1)[:, :latent_size], up_HXC.flatten(0, 1))
    both_NLHX = expanded.view(num_requests, length, num_heads, -1)  # keys without rotary part, then values
    rope_key_NLHP = latents_NLC[..., latent_size:].unsqueeze(2).expand(-1, -1, num_heads, -1)
    key_NLHQ = torch.cat([both_NLHX[..., :query_size], rope_key_NLHP], dim=-1)
    value_NLHV = both_NLHX[..., query_size:]
    q_NHSQ, key_NHLQ, value_NHLV = q_NSHQ.transpose(1, 2), key_NLHQ.transpose(1, 2), value_NLHV.transpose(1, 2)
    fused = takes_cuda_kernels(q_NSHQ) and q_NSHQ.dtype in _FUSED_DTYPES and value_NLHV.shape[3] <= q_NSHQ.shape[3]
    padded = fused and not _takes_short_values(q_NHSQ, key_NHLQ, value_NHLV)
    attention = _causal_padded if padded else causal_attention
    return attention(q_NHSQ, key_NHLQ, value_NHLV, scale).transpose(1, 2)


def _takes_short_values(q_NHSQ: torch.Tensor, key_NHLQ: torch.Tensor, value_NHLV: torch.Tensor) -> bool:
    """Whether cuDNN, which accepts values shorter than keys, has a kernel for these tensors.

    On Hopper it took 0.4 times as long as the flash kernel, which needs padded values.
    """
    if q_NHSQ.shape[2] != key_NHLQ.shape[2]:
        return False  # cuDNN's causal mask assumes that there is no context
    if can_use_cudnn_attention(SDPAParams(q_NHSQ, key_NHLQ, value_NHLV, None, 0.0, True, False)):
        return True
    sizes = f"keys of {q_NHSQ.shape[3]} and values of {value_NHLV.shape[3]} dimensions"
    warn_once(
        f"values are padded to the length of keys, because cuDNN's attention does not support {sizes} here",
        cost="attention of whole prompts took 2.5 times as long on an H100",
        remedy="use a GPU of compute capability 9 or later, and a torch build with cuDNN",
    )
    return False


def _causal_padded(
    q_NHSQ: torch.Tensor, key_NHLQ: torch.Tensor, value_NHLV: torch.Tensor, scale: float
) -> torch.Tensor:
    """`causal_attention` with values padded to the length of keys, as torch's flash kernels need them."""
    value_size = value_NHLV.shape[3]
    padded_NHLQ = F.pad(value_NHLV, (0, key_NHLQ.shape[3] - value_size))
    return causal_attention(q_NHSQ, key_NHLQ, padded_NHLQ, scale)[..., :value_size]


def fold_query(q_NHQ: torch.Tensor, key_up_HQC: torch.Tensor) -> torch.Tensor:
    """Queries that attend to latents themselves: [N, H, C + P2] from [N, H, Q + P2], rotary part last."""
    query_size = key_up_HQC.shape[1]
    latent_q_NHC = torch.einsum("nhq,hqc->nhc", q_NHQ[..., :query_size], key_up_HQC)
    return torch.cat([latent_q_NHC, q_NHQ[..., query_size:]], dim=-1)


def expand_output(out_NHC: torch.Tensor, value_up_HVC: torch.Tensor) -> torch.Tensor:
    """Attention in latent space [N, H, C] to values [N, H, V]."""
    return torch.einsum("nhc,hvc->nhv", out_NHC, value_up_HVC)


def decode_attention(
    q_NHX: torch.Tensor,
    cache_blocks: torch.Tensor,
    block_table_NB: torch.Tensor,
    seq_lens_N: torch.Tensor,
    latent_size: int,
    scale: float,
    *,
    most_positions: int = MOST_POSITIONS,
) -> torch.Tensor:
    """Attention of one new token for each of `N` requests, in latent space: [N, H, C], between the functions above.

    q_NHX: [N, H, C + P2]. seq_lens_N includes the new token, whose latent is already in the cache; a length of 0 gives
    zeros. All sequences are padded to the longest one; most_positions bounds how many positions are gathered at once.
    """

    def decode(q_NHX: torch.Tensor, latents_NLC: torch.Tensor, seq_lens_N: torch.Tensor) -> torch.Tensor:
        key_N1LC = latents_NLC.unsqueeze(1)  # one key/value head for all query heads
        return attend_to_cached(q_NHX, key_N1LC, key_N1LC[..., :latent_size], seq_lens_N, scale)

    return decode_in_groups(decode, q_NHX, cache_blocks, block_table_NB, seq_lens_N, most_positions)
