"""Grouped-query attention over a paged cache of keys and values.

For every token and layer, the cache holds the keys of all key/value heads and then their values:
[num_blocks, block_size, 2 * G * Q]. Consecutive query heads share a key/value head: head h uses h // (H / G).
Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints".

Shapes: `T` tokens, `S` new tokens, `L` tokens of context and new ones, `N` requests, `B` blocks, `H` query heads,
`G` key/value heads, `Q` dimensions of a head.
"""

from __future__ import annotations

import torch

from antiphon.kernels.causal_attention import causal_attention
from antiphon.kernels.paged_cache import MOST_POSITIONS, attend_to_cached, decode_in_groups, gather_blocks


def write_keys_values(
    cache_blocks: torch.Tensor, slots_T: torch.Tensor, key_TGQ: torch.Tensor, value_TGQ: torch.Tensor
) -> None:
    """Write the keys and values of `T` tokens to the cache at `slots_T` = block * block_size + offset."""
    keys, values = cache_blocks.flatten(0, 1).chunk(2, dim=-1)
    keys.index_copy_(0, slots_T, key_TGQ.flatten(1))
    values.index_copy_(0, slots_T, value_TGQ.flatten(1))


def gather_keys_values(
    cache_blocks: torch.Tensor, block_ids_B: torch.Tensor, length: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first `length` tokens of one request: [length, G, Q] each, views of one new tensor."""
    both_LX = gather_blocks(cache_blocks, block_ids_B, length)
    key_LGQ, value_LGQ = both_LX.view(length, 2, -1, head_size).unbind(1)
    return key_LGQ, value_LGQ


def prefill_attention(
    q_NSHQ: torch.Tensor, key_NLGQ: torch.Tensor, value_NLGQ: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of the last `S` of `L` tokens of `N` requests: [N, S, H, Q]."""
    out_NHSQ = causal_attention(q_NSHQ.transpose(1, 2), key_NLGQ.transpose(1, 2), value_NLGQ.transpose(1, 2), scale)
    return out_NHSQ.transpose(1, 2)


def decode_attention(
    q_NHQ: torch.Tensor,
    cache_blocks: torch.Tensor,
    block_table_NB: torch.Tensor,
    seq_lens_N: torch.Tensor,
    scale: float,
    *,
    most_positions: int = MOST_POSITIONS,
) -> torch.Tensor:
    """Attention of one new token for each of `N` requests: [N, H, Q].

    seq_lens_N includes the new token, whose keys and values are already in the cache; a length of 0 gives zeros. The
    host does not wait, because the lengths stay on the device. All sequences are padded to the longest one;
    most_positions bounds how many positions are gathered at once.
    """
    head_size = q_NHQ.shape[2]

    def decode(q_NHQ: torch.Tensor, both_NLX: torch.Tensor, seq_lens_N: torch.Tensor) -> torch.Tensor:
        key_NGLQ, value_NGLQ = torch.unflatten(both_NLX, 2, (2, -1, head_size)).permute(2, 0, 3, 1, 4).unbind(0)
        return attend_to_cached(q_NHQ, key_NGLQ, value_NGLQ, seq_lens_N, scale)

    return decode_in_groups(decode, q_NHQ, cache_blocks, block_table_NB, seq_lens_N, most_positions)
