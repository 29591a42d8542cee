"""Drawing tokens: pure functions of logits and one key per row, without synchronizing with the host.

Every token of a row gets a random number from an exponential distribution, and the token with the largest ratio of
probability to its number is drawn. So each token is drawn with its probability, as with Gumbel's method. The numbers
depend only on the row's key and the token's id, and the key only on the request's seed and its number of tokens. So a
text depends neither on the batch nor on preemptions. It hardly depends on rounding: logits, divided by the temperature,
that differ by 1e-6, as in batches of different sizes, change a token once in about a million draws. (A search in the
cumulative distribution has a boundary for every token of the vocabulary.)

Sums are in float64. A row is sorted only if top_k or top_p need it, and in a large vocabulary only its likeliest tokens
are. Whether they were enough is known without looking at the others.

Shapes: `N` rows, `V` vocabulary, `K` likeliest tokens of a row, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch

_LOW = 2**32


def _signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)


def draw_key(seed: int, count: int) -> int:
    """The key, an int64, of token number `count` (from 0) of a request with this seed."""
    digest = blake2b(seed.to_bytes(8, "little") + count.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def random_bits(key_N: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """64 random bits [N, K] for each token id (from 0) of each row, as int64.

    They are output number `id` of the generator SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", 2014) started at the key, which needs none of the outputs before it. Products wrap.
    """
    bits_NK = key_N.unsqueeze(-1) + (ids_NK + 1) * _STEP
    bits_NK.bitwise_xor_(_without_sign(bits_NK, 30)).mul_(_FIRST_FACTOR)
    bits_NK.bitwise_xor_(_without_sign(bits_NK, 27)).mul_(_SECOND_FACTOR)
    return bits_NK.bitwise_xor_(_without_sign(bits_NK, 31))


def to_exponential(bits: torch.Tensor) -> torch.Tensor:
    """Turn bits into float64 numbers of an exponential distribution, never 0 and never infinite."""
    return _without_sign(bits, 12).double().add_(0.5).mul_(2.0**-52).log_().neg_()


def _without_sign(bits: torch.Tensor, places: int) -> torch.Tensor:
    """A logical shift to the right: zeros come in from the left."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits on what each row may draw, on the device of the logits; see `SamplingParams`. top_k 0 means all."""

    top_k_N: torch.Tensor  # int64
    top_p_N: torch.Tensor  # float64, as the next
    min_p_N: torch.Tensor


def scaled(logits_NV: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """(logits - largest) / temperature in float64 [N, V]. A tiny temperature gives -inf, never nan."""
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    largest_N1 = torch.where(largest_N1.isfinite(), largest_N1, 0.0)  # for a row that is -inf everywhere
    return (logits_NV.double() - largest_N1.double()) / temperature_N.unsqueeze(-1)


def draw(scaled_NV: torch.Tensor, key_N: torch.Tensor, min_p_N: torch.Tensor) -> torch.Tensor:
    """Draw token ids [N] among all tokens that are at least `min_p_N` times as likely as the best."""
    weights_NV = scaled_NV.exp_()
    weights_NV.masked_fill_(weights_NV < min_p_N.unsqueeze(-1), 0.0)  # the best token's weight is 1
    return _first_home(weights_NV, key_N, torch.arange(weights_NV.shape[1], device=weights_NV.device))


def draw_ordered(
    scaled_NK: torch.Tensor, ids_NK: torch.Tensor, total_N: torch.Tensor, key_N: torch.Tensor, limits: Limits
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw token ids [N] among the K likeliest tokens, which are sorted, and say whether K were enough for each row.

    ids_NK: the ids of these tokens. total_N: the sum of exp(scaled) over the vocabulary.
    """
    place_K = torch.arange(scaled_NK.shape[1], device=scaled_NK.device)
    top_k_N1 = limits.top_k_N.unsqueeze(-1)
    weights_NK = scaled_NK.exp()
    weights_NK = weights_NK.masked_fill((top_k_N1 > 0) & (place_K >= top_k_N1), 0.0)
    sums_NK = weights_NK.cumsum(-1)
    # top_p counts within top_k
    total_N = torch.where(limits.top_k_N > 0, sums_NK[:, -1], total_N)
    enough_N = torch.where(limits.top_p_N < 1, limits.top_p_N * total_N, torch.inf)
    kept_NK = (sums_NK - weights_NK < enough_N.unsqueeze(-1)) & (weights_NK >= limits.min_p_N.unsqueeze(-1))
    covered_N = (limits.top_k_N > 0) | (sums_NK[:, -1] >= enough_N) | ~kept_NK[:, -1]
    place_N = _first_home(weights_NK.masked_fill_(~kept_NK, 0.0), key_N, ids_NK)
    return ids_NK.gather(1, place_N.unsqueeze(-1)).squeeze(-1), covered_N


def _first_home(weights_NK: torch.Tensor, key_N: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Draw places [N] with probabilities proportional to the weights; a weight of 0 wins only if all are 0.

    If each token takes an exponential time with its weight as the rate, the first to arrive is drawn. The weights are
    overwritten.
    """
    return weights_NK.div_(to_exponential(random_bits(key_N, ids_NK))).argmax(-1)


def likeliest(values_NV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest values [N, count] of each row, sorted, and their places. Of equal values the first wins."""
    vocab_size = values_NV.shape[1]
    if values_NV.dtype != torch.float32 or 4 * count > vocab_size:
        ordered_NV, ids_NV = values_NV.sort(dim=-1, descending=True, stable=True)
        return ordered_NV[:, :count], ids_NV[:, :count]
    # topk picks arbitrarily among equal values. So value and place become one number: the bits of the float, ordered
    # by value, and below them the place, counted from the end.
    bits_NV = (values_NV + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    order_NV = bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)
    from_end_V = torch.arange(vocab_size - 1, -1, -1, device=values_NV.device)
    keys_NK = (order_NV.long() * _LOW + from_end_V).topk(count, dim=-1).values
    ids_NK = vocab_size - 1 - keys_NK % _LOW
    return values_NV.gather(1, ids_NK), ids_NK
