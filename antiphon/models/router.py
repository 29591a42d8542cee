"""Routers: which experts a token goes to, and with what weights.

Shapes: `T` tokens, `D` hidden size, `E` experts, `K` experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from antiphon.comm import Routes
from antiphon.kernels.dispatch import takes_cuda_kernels
from antiphon.kernels.router import GroupLimit, PairCounts, Scoring, choose_experts
from antiphon.models.config import ConfigFile
from antiphon.models.layers import parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """How experts are chosen and weighted."""

    scores: Scoring
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool  # make the weights of a token add up to 1, before scaling
    scale: float = 1.0
    narrow: bool = False  # softmax only: multiply in the model's dtype, as the model was trained, not in float32

    @staticmethod
    def read_sigmoid(file: ConfigFile, *, default_scale: float) -> RoutingConfig:
        """Routing as DeepSeek-V3 has it, and GLM-4.5. Raises `ModelError` for keys that are missing or wrong."""
        return RoutingConfig(
            scores=Scoring.SIGMOID,
            num_experts=file.count("n_routed_experts"),
            top_k=file.count("num_experts_per_tok"),
            num_groups=file.count("n_group"),
            top_groups=file.count("topk_group"),
            normalize=file.flag("norm_topk_prob", True),
            scale=file.number("routed_scaling_factor", default_scale),
        )

    @property
    def best_of_group(self) -> int:
        """How many of its best experts determine a group's score."""
        return 2 if self.scores is Scoring.SIGMOID else 1

    @property
    def limit(self) -> GroupLimit | None:
        """The groups to choose in; None if all of them are allowed."""
        if self.top_groups >= self.num_groups:
            return None
        return GroupLimit(num_groups=self.num_groups, top_groups=self.top_groups, best_of_group=self.best_of_group)


def check_groups(file: ConfigFile, routing: RoutingConfig) -> None:
    """Check that the groups fit the experts. Raises `ModelError` if not."""
    per_group, rest = divmod(routing.num_experts, routing.num_groups)
    if rest or routing.top_groups > routing.num_groups:
        limit = f"it must divide n_routed_experts={routing.num_experts} and be at least topk_group={routing.top_groups}"
        raise file.fault("n_group", routing.num_groups, limit=limit, remedy="use the model's own file")
    limited = routing.top_groups < routing.num_groups
    if routing.top_k > per_group * routing.top_groups or (limited and per_group < routing.best_of_group):
        limit = f"a token chooses from {routing.top_groups} groups of {per_group} experts"
        raise file.fault("num_experts_per_tok", routing.top_k, limit=limit, remedy="use the model's own file")


class Router(nn.Module):
    """Scores all experts, keeps the best groups if the model limits them, and chooses the best experts.

    Softmax: DeepSeek-V2 paper, 2.2, and Qwen3. Sigmoid, with a correction bias that affects the choice only:
    DeepSeek-V3 paper, 2.1.2, and GLM-4.5.
    """

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, hidden_size: int, config: RoutingConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.limit = config, config.limit
        self.counts: PairCounts | None = None  # set while the load of the experts is counted
        self.wide = torch.promote_types(dtype, torch.float32)
        self.weight = parameter(config.num_experts, hidden_size, dtype=dtype)
        biased = config.scores is Scoring.SIGMOID
        self.register_buffer(
            "e_score_correction_bias", torch.empty(config.num_experts, dtype=self.wide) if biased else None
        )

    def forward(self, x_TD: torch.Tensor, num_real_1: torch.Tensor | None = None) -> Routes:
        """num_real_1: int64 [1], the number of tokens that are not padding; the others get the expert id -1."""
        config = self.config
        ids_TK, weights_TK = choose_experts(
            self._logits(x_TD),
            config.top_k,
            config.scores,
            bias_E=self.e_score_correction_bias,
            normalize=config.normalize,
            scale=config.scale,
            limit=self.limit,
            num_real_1=num_real_1,
            counts=self.counts,
        )
        return Routes(ids_TK, weights_TK)

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, E] in float32 at least."""
        if self.config.narrow:
            return F.linear(x_TD, self.weight).to(self.wide)
        if takes_cuda_kernels(x_TD) and x_TD.dtype != self.wide and x_TD.shape[0]:
            # Products of 16-bit numbers are exact in float32, so neither side needs converting.
            return torch.mm(x_TD, self.weight.t(), out_dtype=self.wide)
        return F.linear(x_TD.to(self.wide), self.weight.to(self.wide))
