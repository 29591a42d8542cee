"""Drawing tokens: pure functions of logits and of one number per row, without a word to the host.

A token is drawn by the inverse of the cumulative distribution, from one uniform number that depends on nothing but the
request's seed and how many tokens it has (a counter-based generator, as in Salmon et al., "Parallel Random Numbers:
As Easy as 1, 2, 3", 2011). So a text does not depend on the batch, and not on a preemption either.

Sums are in float64. A row is put into order only if top_k or top_p need it, and then, in a large vocabulary, only its
likeliest tokens; whether they were enough is known without looking at the others.

Shapes: `N` rows, `V` vocabulary, `K` likeliest tokens of a row, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch

__all__ = ["Limits", "draw", "draw_ordered", "likeliest", "scaled", "uniform"]

_LOW = 2**32


def uniform(seed: int, count: int) -> float:
    """A number in [0, 1), one of 2**53, for the token number `count` (from 0) of a request with this seed."""
    digest = blake2b(seed.to_bytes(8, "little") + count.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What rows may be drawn from, on the device of their logits; see `SamplingParams`. top_k 0 is all."""

    top_k_N: torch.Tensor  # int64
    top_p_N: torch.Tensor  # float64, as the next
    min_p_N: torch.Tensor


def scaled(logits_NV: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """(logits - largest) / temperature in float64 [N, V]: a tiny temperature gives -inf, and never nan."""
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    largest_N1 = torch.where(largest_N1.isfinite(), largest_N1, 0.0)  # of a row that is -inf everywhere
    return (logits_NV.double() - largest_N1.double()) / temperature_N.unsqueeze(-1)


def draw(scaled_NV: torch.Tensor, uniform_N: torch.Tensor, min_p_N: torch.Tensor) -> torch.Tensor:
    """Token ids [N], by the probability among all tokens that are at least `min_p_N` times as likely as the best."""
    weights_NV = scaled_NV.exp_()
    weights_NV.masked_fill_(weights_NV < min_p_N.unsqueeze(-1), 0.0)  # the best token's weight is 1
    sums_NV = weights_NV.cumsum(-1)
    found_N = _first_above(weights_NV, sums_NV, uniform_N * sums_NV[:, -1])
    return torch.where(found_N < weights_NV.shape[1], found_N, weights_NV.argmax(-1))


def draw_ordered(
    scaled_NK: torch.Tensor, total_N: torch.Tensor, uniform_N: torch.Tensor, limits: Limits
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [N] among the K likeliest tokens, which are in order, and whether K were enough for this row.

    total_N: the sum of exp(scaled) over the vocabulary.
    """
    num_kept = scaled_NK.shape[1]
    place_K = torch.arange(num_kept, device=scaled_NK.device)
    top_k_N1 = limits.top_k_N.unsqueeze(-1)
    weights_NK = scaled_NK.exp()
    weights_NK = weights_NK.masked_fill((top_k_N1 > 0) & (place_K >= top_k_N1), 0.0)
    sums_NK = weights_NK.cumsum(-1)
    # top_p counts within top_k
    total_N = torch.where(limits.top_k_N > 0, sums_NK[:, -1], total_N)
    enough_N = torch.where(limits.top_p_N < 1, limits.top_p_N * total_N, torch.inf)
    kept_NK = (sums_NK - weights_NK < enough_N.unsqueeze(-1)) & (weights_NK >= limits.min_p_N.unsqueeze(-1))
    weights_NK = weights_NK.masked_fill(~kept_NK, 0.0)
    reach_N = sums_NK.masked_fill(~kept_NK, 0.0).amax(-1)  # they are the first ones, so the sums are theirs
    found_N = _first_above(weights_NK, sums_NK, uniform_N * reach_N)
    covered_N = (limits.top_k_N > 0) | (sums_NK[:, -1] >= enough_N) | ~kept_NK[:, -1]
    return torch.where(found_N < num_kept, found_N, 0), covered_N


def _first_above(weights_NK: torch.Tensor, sums_NK: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """The first place with a weight whose sum is above the target; K if rounding leaves none."""
    num_places = weights_NK.shape[1]
    place_K = torch.arange(num_places, device=weights_NK.device)
    hit_NK = (sums_NK > target_N.unsqueeze(-1)) & (weights_NK > 0)
    return torch.where(hit_NK, place_K, num_places).amin(-1)


def likeliest(values_NV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest values [N, count] of each row, in order, and their places; of equal ones the first."""
    vocab_size = values_NV.shape[1]
    if values_NV.dtype != torch.float32 or 4 * count > vocab_size:
        ordered_NV, ids_NV = values_NV.sort(dim=-1, descending=True, stable=True)
        return ordered_NV[:, :count], ids_NV[:, :count]
    # topk picks any of equal values. So value and place become one number: the bits of a float in order of its value,
    # and below them the place, counted from the end.
    bits_NV = (values_NV + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    order_NV = bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)
    from_end_V = torch.arange(vocab_size - 1, -1, -1, device=values_NV.device)
    keys_NK = (order_NV.long() * _LOW + from_end_V).topk(count, dim=-1).values
    ids_NK = vocab_size - 1 - keys_NK % _LOW
    return values_NV.gather(1, ids_NK), ids_NK
