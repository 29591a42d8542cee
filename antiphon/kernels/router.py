"""Choosing experts from a router's logits, without groups.

Shapes: `T` tokens, `E` experts, `K` experts per token.
"""

from __future__ import annotations

from enum import Enum

import torch

from antiphon.kernels.dispatch import fused


class Scoring(Enum):
    """How scores are computed from logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@fused("router")
def choose_experts(
    logits_TE: torch.Tensor,
    top_k: int,
    scoring: Scoring,
    *,
    bias_E: torch.Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    num_real_1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids [T, K] (int64) and weights [T, K] (logits' dtype) of each token's best experts, best first.

    logits_TE: float32 or float64. bias_E: same dtype, added to the scores for the choice only; not with softmax.
    Ties go to the lower id. normalize: make the weights of a token add up to 1 before applying `scale`.
    The ids of a token are distinct and in range even if logits are nan.
    num_real_1: int64 [1]; tokens from this index on are padding and get the id -1, with undefined weights.
    """
    check_choice(logits_TE, top_k, scoring, bias_E)
    if scoring is Scoring.SOFTMAX:
        scores_TE, choice_TE = logits_TE.softmax(-1), logits_TE  # softmax may round away differences between logits
    else:
        scores_TE = logits_TE.sigmoid()
        choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    choice_TE = choice_TE.masked_fill(choice_TE.isnan(), float("-inf"))
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK if num_real_1 is None else hide_padding(ids_TK, num_real_1), weights_TK * scale


def hide_padding(ids_TK: torch.Tensor, num_real_1: torch.Tensor) -> torch.Tensor:
    """The ids, with -1 for all tokens from index `num_real_1` on; new."""
    tokens_T1 = torch.arange(ids_TK.shape[0], device=ids_TK.device).unsqueeze(1)
    return ids_TK.masked_fill(tokens_T1 >= num_real_1, -1)


def check_choice(logits_TE: torch.Tensor, top_k: int, scoring: Scoring, bias_E: torch.Tensor | None) -> None:
    """Assert what `choose_experts` requires of its arguments."""
    assert logits_TE.dtype in (torch.float32, torch.float64), "logits are float32 or float64"
    assert bias_E is None or scoring is Scoring.SIGMOID, "softmax routing has no bias"
    assert 1 <= top_k <= logits_TE.shape[1], "more experts per token than experts"
