"""Reading the paged cache: the tokens of one request, and attention of many requests that decode one token each.

Shapes: `N` requests, `B` blocks of a request, `L` tokens in them, `X` numbers per token in the cache, `H` query heads,
`G` key/value heads, `h` = H / G, `Q` dimensions of queries and keys, `V` of values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MOST_POSITIONS = 1 << 18
"""Positions of decoding requests gathered at once, padded to the longest: 512 MiB at 1,024 bfloat16 numbers each."""


def gather_blocks(cache_blocks: torch.Tensor, block_ids_B: torch.Tensor, length: int) -> torch.Tensor:
    """The cache contents of the first `length` tokens of one request: [length, X], new."""
    return cache_blocks[block_ids_B].flatten(0, 1)[:length]


def decode_in_groups(
    decode: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q_NHQ: torch.Tensor,
    cache_blocks: torch.Tensor,
    block_table_NB: torch.Tensor,
    seq_lens_N: torch.Tensor,
    most_positions: int,
) -> torch.Tensor:
    """`decode(q_NHQ, gathered_NLX, seq_lens_N)` for as many requests at a time as `most_positions` allows: [N, H, V].

    Each request is padded to the width of the block table. One request is computed even if it alone exceeds the bound.
    """
    num_requests, length = q_NHQ.shape[0], block_table_NB.shape[1] * cache_blocks.shape[1]
    step = max(1, most_positions // max(1, length))
    parts = []
    for start in range(0, num_requests, step):
        some = slice(start, start + step)
        parts.append(decode(q_NHQ[some], cache_blocks[block_table_NB[some]].flatten(1, 2), seq_lens_N[some]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_to_cached(
    q_NHQ: torch.Tensor, key_NGLQ: torch.Tensor, value_NGLV: torch.Tensor, seq_lens_N: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one token per request to the first `seq_lens_N` positions: [N, H, V]. A length of 0 gives zeros.

    The host does not wait, because the lengths stay on the device. Positions past the length may hold anything.
    """
    num_requests, num_heads, head_size = q_NHQ.shape
    num_kv_heads, length = key_NGLQ.shape[1:3]
    hidden_NL = torch.arange(length, device=q_NHQ.device) >= seq_lens_N.unsqueeze(1)
    q_NGhQ = q_NHQ.reshape(num_requests, num_kv_heads, num_heads // num_kv_heads, head_size)
    scores_NGhL = torch.matmul(q_NGhQ, key_NGLQ.transpose(2, 3)) * scale
    # The lowest number, not minus infinity: with the values of hidden positions at zero, a length of 0 gives zeros.
    scores_NGhL = scores_NGhL.masked_fill(hidden_NL[:, None, None], torch.finfo(scores_NGhL.dtype).min)
    wide = torch.promote_types(q_NHQ.dtype, torch.float32)
    weights_NGhL = scores_NGhL.softmax(dim=-1, dtype=wide).to(q_NHQ.dtype)
    # Unused slots may hold anything, even infinities: 0 * inf would be nan.
    return torch.matmul(weights_NGhL, value_NGLV.masked_fill(hidden_NL[:, None, :, None], 0)).flatten(1, 2)
