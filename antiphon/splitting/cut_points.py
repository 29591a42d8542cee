"""Where to cut a batch: the rules `token` and `request-boundary`.

`token` cuts anywhere, so the parts differ by at most one token; a request that straddles a cut becomes two slices.
`request-boundary` cuts only between requests, and only if a boundary is close enough to the even cut. Both rules cut a
decode-only batch, which has one token per request, evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from antiphon.core.errors import OptionError, out_of_range, unknown_value
from antiphon.core.plan import MAX_LANES, SerialReason
from antiphon.core.policy import SPLIT_RULES

DEFAULT_IMBALANCE_RATIO = 0.1


@dataclass(frozen=True, slots=True)
class Cut:
    """Tokens of each part. If the batch cannot be cut, there is one part, and `refusal` says why."""

    part_tokens: tuple[int, ...]
    refusal: SerialReason = SerialReason.NONE


def request_boundary(
    query_lens: Sequence[int] | None,
    *,
    num_tokens: int,
    decode_only: bool = False,
    imbalance_ratio: float = DEFAULT_IMBALANCE_RATIO,
) -> tuple[int, int]:
    """Find the boundary between requests at which to cut a batch in two: (token index, request index).

    query_lens: tokens of each request. num_tokens: tokens of the batch; used only if `decode_only`, where every request
        has one token and the cut is in the middle. Otherwise the sum of `query_lens` counts.
    Returns (0, 0) if no boundary leaves both parts non-empty and (strictly) within `imbalance_ratio` of the even cut.
    Raises `OptionError` (a `ValueError`) for a ratio outside [0, 1] and for negative lengths.
    Source of the rule: vLLM-Ascend's dual-batch overlap (pull request 941).
    """
    _check_ratio(imbalance_ratio)
    if decode_only:
        if num_tokens < 0:
            raise _negative("num_tokens", num_tokens)
        middle = num_tokens // 2
        return (middle, middle)
    query_lens = [] if query_lens is None else query_lens
    total = _checked_sum(query_lens)
    return _boundary_near(query_lens, total // 2, total, imbalance_ratio)


def find_cut(
    query_lens: Sequence[int],
    *,
    num_parts: int,
    rule: str,
    decode_only: bool = False,
    imbalance_ratio: float = DEFAULT_IMBALANCE_RATIO,
) -> Cut:
    """Cut a batch into `num_parts` parts by the named rule; one part if that is not possible.

    Raises `OptionError` for an unknown rule or a number of parts outside 1 to `MAX_LANES`.
    """
    if rule not in SPLIT_RULES:
        raise unknown_value("split", rule, SPLIT_RULES)
    if not 1 <= num_parts <= MAX_LANES:
        raise out_of_range("num_parts", num_parts, f"1 to {MAX_LANES}")
    _check_ratio(imbalance_ratio)
    total = _checked_sum(query_lens)
    whole = (total,)
    if num_parts == 1:
        return Cut(whole)
    if total < num_parts:
        return Cut(whole, SerialReason.TOO_FEW_TOKENS)
    targets = [total * part // num_parts for part in range(1, num_parts)]
    if rule == "token" or decode_only:
        return Cut(_lengths(targets, total))
    nearest = num_parts > 2
    cuts = [_boundary_near(query_lens, target, total, imbalance_ratio, nearest=nearest)[0] for target in targets]
    if 0 in cuts or len(set(cuts)) < len(cuts):
        return Cut(whole, SerialReason.NO_BOUNDARY)
    return Cut(_lengths(cuts, total))


def _boundary_near(
    query_lens: Sequence[int], target: int, total: int, imbalance_ratio: float, *, nearest: bool = False
) -> tuple[int, int]:
    """The boundary at or after `target` if it is close enough, else the one before; with `nearest` the closer first."""
    tolerance = total * imbalance_ratio
    tokens = 0
    for index, length in enumerate(query_lens):
        before, tokens = tokens, tokens + length
        if tokens < target:
            continue
        candidates = [(tokens, index + 1), (before, index)]
        if nearest:
            candidates.sort(key=lambda cut: abs(cut[0] - target))
        for cut in candidates:
            if abs(cut[0] - target) < tolerance and 0 < cut[0] < total:
                return cut
        break
    return (0, 0)


def _lengths(cuts: Sequence[int], total: int) -> tuple[int, ...]:
    edges = [0, *cuts, total]
    return tuple(stop - start for start, stop in pairwise(edges))


def _checked_sum(query_lens: Sequence[int]) -> int:
    for index, length in enumerate(query_lens):
        if length < 0:
            raise _negative(f"query_lens[{index}]", length)
    return sum(query_lens)


def _negative(name: str, value: int) -> OptionError:
    return OptionError(f"{name}={value} is negative", remedy="use a count of tokens", option=name, value=value)


def _check_ratio(imbalance_ratio: float) -> None:
    if not 0 <= imbalance_ratio <= 1:
        raise out_of_range("imbalance_ratio", imbalance_ratio, "0 to 1")
