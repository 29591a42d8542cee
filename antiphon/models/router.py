"""Routers: which experts a token goes to, and with what weights.

Shapes: `T` tokens, `D` hidden size, `E` experts, `K` experts per token, `G` groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from antiphon.comm import Routes
from antiphon.core.errors import ModelError
from antiphon.models.config import ConfigFile
from antiphon.models.layers import parameter

__all__ = ["Router", "RoutingConfig", "SigmoidRouter", "SoftmaxRouter", "check_groups", "make_router"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """How experts are chosen and weighed."""

    scores: Literal["sigmoid", "softmax"]
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool  # make the weights of a token add up to 1, before scaling
    scale: float = 1.0
    narrow: bool = False  # softmax only: multiply in the model's dtype, as the model was trained, not in float32

    @property
    def best_of_group(self) -> int:
        """How many of its best experts a group is judged by."""
        return 2 if self.scores == "sigmoid" else 1


def check_groups(file: ConfigFile, routing: RoutingConfig) -> None:
    """Raises `ModelError` if the groups do not fit the experts."""
    per_group, rest = divmod(routing.num_experts, routing.num_groups)
    if rest or routing.top_groups > routing.num_groups:
        raise ModelError(
            f"{file.path} has n_routed_experts={routing.num_experts}, n_group={routing.num_groups}, "
            f"topk_group={routing.top_groups}; groups must divide the experts and contain the chosen ones"
        )
    limited = routing.top_groups < routing.num_groups
    if routing.top_k > per_group * routing.top_groups or (limited and per_group < routing.best_of_group):
        raise ModelError(
            f"{file.path} has num_experts_per_tok={routing.top_k}, but chooses "
            f"from {routing.top_groups} groups of {per_group} experts"
        )


class Router(nn.Module):
    """What both kinds share: the weight, and the limit on groups."""

    def __init__(self, hidden_size: int, config: RoutingConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.wide = torch.promote_types(dtype, torch.float32)
        self.weight = parameter(config.num_experts, hidden_size, dtype=dtype)

    def _wide_logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TD.to(self.wide), self.weight.to(self.wide))

    def _allowed(self, choice_TE: torch.Tensor) -> torch.Tensor:
        """Minus infinity for the experts outside the best groups."""
        config = self.config
        if config.top_groups == config.num_groups:
            return choice_TE
        choice_TGe = choice_TE.view(-1, config.num_groups, config.num_experts // config.num_groups)
        group_scores_TG = choice_TGe.topk(config.best_of_group, dim=-1).values.sum(-1)
        best_TG = group_scores_TG.topk(config.top_groups, sorted=False).indices
        refused_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_TG, False)
        return choice_TGe.masked_fill(refused_TG.unsqueeze(-1), float("-inf")).flatten(1)

    def _finished(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Routes:
        if self.config.normalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        if self.config.scale != 1.0:
            weights_TK = weights_TK * self.config.scale
        return Routes(ids_TK, weights_TK)


class SigmoidRouter(Router):
    """Sigmoid scores, a correction bias that only chooses, and a limit on groups (DeepSeek-V3 paper, 2.1.2)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, hidden_size: int, config: RoutingConfig, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, config, dtype=dtype)
        self.register_buffer("e_score_correction_bias", torch.empty(config.num_experts, dtype=self.wide))

    def forward(self, x_TD: torch.Tensor) -> Routes:
        scores_TE = self._wide_logits(x_TD).sigmoid()
        ids_TK = self._allowed(scores_TE + self.e_score_correction_bias).topk(self.config.top_k, sorted=False).indices
        return self._finished(ids_TK, scores_TE.gather(1, ids_TK))


class SoftmaxRouter(Router):
    """Softmax over all experts, then the best ones (DeepSeek-V2 paper, 2.2; Qwen3)."""

    def forward(self, x_TD: torch.Tensor) -> Routes:
        logits_TE = F.linear(x_TD, self.weight) if self.config.narrow else self._wide_logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1, dtype=self.wide)
        weights_TK, ids_TK = self._allowed(scores_TE).topk(self.config.top_k, sorted=False)
        return self._finished(ids_TK, weights_TK)


def make_router(hidden_size: int, config: RoutingConfig, *, dtype: torch.dtype) -> Router:
    """The router that the config asks for."""
    kind = SigmoidRouter if config.scores == "sigmoid" else SoftmaxRouter
    return kind(hidden_size, config, dtype=dtype)
