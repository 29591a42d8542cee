"""The choice of experts from a router's logits, without groups.

Shapes: `T` tokens, `E` experts, `K` experts per token.
"""

from __future__ import annotations

from enum import Enum

import torch


class Scoring(Enum):
    """From logits to scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


def choose_experts(
    logits_TE: torch.Tensor,
    top_k: int,
    scoring: Scoring,
    *,
    bias_E: torch.Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids [T, K] (int64) and weights [T, K] (logits' dtype) of each token's best experts, best first.

    logits_TE: float32 or float64. bias_E: of the same dtype, added to the scores for the choice only; not with softmax.
    Of equal experts the lower id is chosen. normalize: weights of a token add up to 1, before `scale`.
    The ids of a token are all different and in range whatever the logits hold, nan too.
    """
    assert logits_TE.dtype in (torch.float32, torch.float64), "logits are float32 or float64"
    assert bias_E is None or scoring is Scoring.SIGMOID, "softmax routing has no bias"
    assert 1 <= top_k <= logits_TE.shape[1], "more experts per token than experts"
    if logits_TE.is_cuda:
        from antiphon.kernels.fused.router import choose_experts_fused  # Triton comes with CUDA only

        return choose_experts_fused(logits_TE, top_k, scoring, bias_E=bias_E, normalize=normalize, scale=scale)
    return choose_experts_reference(logits_TE, top_k, scoring, bias_E=bias_E, normalize=normalize, scale=scale)


def choose_experts_reference(
    logits_TE: torch.Tensor,
    top_k: int,
    scoring: Scoring,
    *,
    bias_E: torch.Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    if scoring is Scoring.SOFTMAX:
        scores_TE, choice_TE = logits_TE.softmax(-1), logits_TE  # logits keep an order that softmax may round away
    else:
        scores_TE = logits_TE.sigmoid()
        choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    choice_TE = choice_TE.masked_fill(choice_TE.isnan(), float("-inf"))
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * scale
