"""Choosing experts from a router's logits.

Shapes: `T` tokens, `E` experts, `K` experts per token, `G` groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

from antiphon.kernels.dispatch import fused


class Scoring(Enum):
    """How scores are computed from logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimit:
    """A token's experts are all in the best `top_groups` of `num_groups` groups of neighboring experts.

    The score of a group is the sum of what its `best_of_group` best experts are chosen by.
    """

    num_groups: int
    top_groups: int
    best_of_group: int


class PairCounts(NamedTuple):
    """Where pairs of a token and an expert are counted while a switch on the device is on, also in captured steps."""

    counts_E: torch.Tensor  # int64, or [L, E] to count the same pairs for L layers
    switch_1: torch.Tensor  # int32 [1]: 1 if pairs are counted, else 0


@fused("router")
def choose_experts(
    logits_TE: torch.Tensor,
    top_k: int,
    scoring: Scoring,
    *,
    bias_E: torch.Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    limit: GroupLimit | None = None,
    num_real_1: torch.Tensor | None = None,
    counts: PairCounts | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids [T, K] (int64) and weights [T, K] (logits' dtype) of each token's best experts, best first.

    logits_TE: float32 or float64. bias_E: same dtype, added to the scores for the choice only; not with softmax.
    Ties go to the lower id, of groups too. normalize: make the weights of a token add up to 1 before applying `scale`.
    The ids of a token are distinct and in range even if logits are nan.
    num_real_1: int64 [1]; tokens from this index on are padding and get the id -1, with undefined weights.
    counts: where to count the pairs, padding excluded.
    """
    check_choice(logits_TE, top_k, scoring, bias_E, limit)
    if scoring is Scoring.SOFTMAX:
        scores_TE = logits_TE.softmax(-1)
        choice_TE = scores_TE if limit else logits_TE  # softmax may round away differences between logits
    else:
        scores_TE = logits_TE.sigmoid()
        choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    choice_TE = choice_TE.masked_fill(choice_TE.isnan(), float("-inf"))
    ids_TE = choice_TE.sort(dim=-1, descending=True, stable=True).indices
    if limit:
        # Those of refused groups go behind all others, even behind ones at minus infinity.
        refused_TE = _refused(choice_TE, limit).gather(1, ids_TE)
        ids_TE = ids_TE.gather(1, refused_TE.to(torch.uint8).sort(dim=-1, stable=True).indices)
    ids_TK = ids_TE[:, :top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    ids_TK = ids_TK if num_real_1 is None else hide_padding(ids_TK, num_real_1)
    if counts is not None:
        count_pairs(ids_TK, counts)
    return ids_TK, weights_TK * scale


def count_pairs(ids_TK: torch.Tensor, counts: PairCounts) -> None:
    """Count the pairs of these ids, of which -1 is padding. The host does not wait."""
    ids_X = ids_TK.flatten().to(torch.int64)
    counted_X = (ids_X >= 0).to(torch.int64) * counts.switch_1
    counts_E = counts.counts_E
    counts_E.index_add_(-1, ids_X.clamp(min=0), counted_X.expand(*counts_E.shape[:-1], -1))


def _refused(choice_TE: torch.Tensor, limit: GroupLimit) -> torch.Tensor:
    """Whether an expert is in none of the best groups: bool [T, E]."""
    size = choice_TE.shape[1] // limit.num_groups
    scores_TG = choice_TE.view(-1, limit.num_groups, size).topk(limit.best_of_group, dim=-1).values.sum(-1)
    best_TG = scores_TG.sort(dim=-1, descending=True, stable=True).indices[:, : limit.top_groups]
    refused_TG = torch.ones_like(scores_TG, dtype=torch.bool).scatter_(1, best_TG, False)
    return refused_TG.repeat_interleave(size, dim=1)


def hide_padding(ids_TK: torch.Tensor, num_real_1: torch.Tensor) -> torch.Tensor:
    """The ids, with -1 for all tokens from index `num_real_1` on; new."""
    tokens_T1 = torch.arange(ids_TK.shape[0], device=ids_TK.device).unsqueeze(1)
    return ids_TK.masked_fill(tokens_T1 >= num_real_1, -1)


def check_choice(
    logits_TE: torch.Tensor, top_k: int, scoring: Scoring, bias_E: torch.Tensor | None, limit: GroupLimit | None
) -> None:
    """Assert what `choose_experts` requires of its arguments."""
    assert logits_TE.dtype in (torch.float32, torch.float64), "logits are float32 or float64"
    assert bias_E is None or scoring is Scoring.SIGMOID, "softmax routing has no bias"
    num_experts = logits_TE.shape[1]
    assert 1 <= top_k <= num_experts, "more experts per token than experts"
    if limit:
        size, rest = divmod(num_experts, limit.num_groups)
        assert rest == 0 and 1 <= limit.best_of_group <= size, "groups do not fit the experts"
        assert 1 <= limit.top_groups <= limit.num_groups and top_k <= limit.top_groups * size, "groups leave too few"
