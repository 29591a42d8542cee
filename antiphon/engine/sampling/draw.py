"""Draws tokens: pure functions of logits and one key per row, which never synchronize with the host.

Every token of a row gets an exponentially distributed random number, and the token with the largest ratio of
probability to its number is drawn. Each token is thus drawn with its probability, as with the Gumbel-max trick. The
numbers depend only on the row's key and the token's id, and the key only on the request's seed and its number of
tokens, so a text depends neither on the batch nor on preemptions. It hardly depends on rounding: differences of 1e-6
between logits divided by the temperature, as between batches of different sizes, change a token once in about a million
draws. (A search in the cumulative distribution has a boundary for every token of the vocabulary.)

Sums are in float64. A row is sorted only if top_k or top_p needs it. In a large vocabulary only its likeliest tokens
are sorted, and whether they were enough is known without looking at the others.

Shapes: `N` rows, `V` vocabulary, `K` likeliest tokens of a row, in order.
"""

from __future__ import annotations

from hashlib import blake2b

import torch

_LOW = 2**32


def _signed(bits: int) -> int:
    """Reinterpret 64 bits as an int64."""
    return bits - 2**64 if bits >= 2**63 else bits


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)


def draw_key(seed: int, count: int) -> int:
    """Return the key, an int64, for token number `count` (from 0) of a request with this seed."""
    digest = blake2b(seed.to_bytes(8, "little") + count.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def random_bits(key_N: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Return 64 random bits [N, K], as int64, for each token id (from 0) of each row.

    They are output number `id` of the generator SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", 2014) seeded with the key; computing it needs no earlier output. Products wrap.
    """
    bits_NK = key_N.unsqueeze(-1) + (ids_NK + 1) * _STEP
    bits_NK.bitwise_xor_(_without_sign(bits_NK, 30)).mul_(_FIRST_FACTOR)
    bits_NK.bitwise_xor_(_without_sign(bits_NK, 27)).mul_(_SECOND_FACTOR)
    return bits_NK.bitwise_xor_(_without_sign(bits_NK, 31))


def to_exponential(bits: torch.Tensor) -> torch.Tensor:
    """Turn bits into exponentially distributed float64 numbers, never 0 and never infinite."""
    return _without_sign(bits, 12).double().add_(0.5).mul_(2.0**-52).log_().neg_()


def _without_sign(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Logical right shift: zeros come in from the left."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def scaled(logits_NV: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """Return (logits - largest) / temperature in float64 [N, V]. A tiny temperature gives -inf, never nan."""
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    largest_N1 = torch.where(largest_N1.isfinite(), largest_N1, 0.0)  # for a row that is -inf everywhere
    return (logits_NV.double() - largest_N1.double()) / temperature_N.unsqueeze(-1)


def draw(scaled_NV: torch.Tensor, key_N: torch.Tensor, min_p_N: torch.Tensor) -> torch.Tensor:
    """Draw token ids [N] among all tokens that are at least `min_p_N` times as likely as the likeliest."""
    weights_NV = scaled_NV.exp_()
    weights_NV.masked_fill_(weights_NV < min_p_N.unsqueeze(-1), 0.0)  # the likeliest token's weight is 1
    return _draw_places(weights_NV, key_N, torch.arange(weights_NV.shape[1], device=weights_NV.device))


def draw_ordered(
    scaled_NK: torch.Tensor,
    ids_NK: torch.Tensor,
    key_N: torch.Tensor,
    *,
    total_N: torch.Tensor,
    top_k_N: torch.Tensor,
    top_p_N: torch.Tensor,
    min_p_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw token ids [N] among the K likeliest tokens, likeliest first, and say for each row whether K were enough.

    ids_NK: the ids of these tokens. total_N: the sum of exp(scaled) over the vocabulary. top_k_N (int64, 0 for all),
    top_p_N and min_p_N (float64): see `SamplingParams`.
    """
    place_K = torch.arange(scaled_NK.shape[1], device=scaled_NK.device)
    top_k_N1 = top_k_N.unsqueeze(-1)
    weights_NK = scaled_NK.exp()
    weights_NK = weights_NK.masked_fill((top_k_N1 > 0) & (place_K >= top_k_N1), 0.0)
    sums_NK = weights_NK.cumsum(-1)
    # top_p counts within top_k
    total_N = torch.where(top_k_N > 0, sums_NK[:, -1], total_N)
    enough_N = torch.where(top_p_N < 1, top_p_N * total_N, torch.inf)
    kept_NK = (sums_NK - weights_NK < enough_N.unsqueeze(-1)) & (weights_NK >= min_p_N.unsqueeze(-1))
    covered_N = (top_k_N > 0) | (sums_NK[:, -1] >= enough_N) | ~kept_NK[:, -1]
    place_N = _draw_places(weights_NK.masked_fill_(~kept_NK, 0.0), key_N, ids_NK)
    return ids_NK.gather(1, place_N.unsqueeze(-1)).squeeze(-1), covered_N


def _draw_places(weights_NK: torch.Tensor, key_N: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Draw places [N] with probabilities proportional to the weights. A weight of 0 wins only if all are 0.

    It is a race: the time of each token is exponentially distributed with its weight as the rate, and the fastest wins.
    The weights are overwritten.
    """
    return weights_NK.div_(to_exponential(random_bits(key_N, ids_NK))).argmax(-1)


def likeliest(values_NV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest values [N, count] of each row, sorted, and their places; ties go to the first."""
    vocab_size = values_NV.shape[1]
    if values_NV.dtype != torch.float32 or 4 * count > vocab_size:
        ordered_NV, ids_NV = values_NV.sort(dim=-1, descending=True, stable=True)
        return ordered_NV[:, :count], ids_NV[:, :count]
    # topk breaks ties arbitrarily, so value and place are packed into one number: the bits of the float in the order of
    # its value, and below them the place, counted from the end.
    bits_NV = (values_NV + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    order_NV = bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)
    from_end_V = torch.arange(vocab_size - 1, -1, -1, device=values_NV.device)
    keys_NK = (order_NV.long() * _LOW + from_end_V).topk(count, dim=-1).values
    ids_NK = vocab_size - 1 - keys_NK % _LOW
    return values_NV.gather(1, ids_NK), ids_NK
