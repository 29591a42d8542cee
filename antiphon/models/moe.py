"""The MoE layer: the one place where lanes overlap.

Shapes: `T` tokens, `D` hidden size, `E` experts, `K` experts per token, `R` rows received, `F` expert width,
`G` groups of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from antiphon.comm import Routes, Rows, Transport
from antiphon.core.batch import current_micro_batch
from antiphon.kernels.grouped_experts import grouped_experts
from antiphon.models.layers import GatedFeedForward, parameter
from antiphon.runtime import Pending, finish

__all__ = ["Experts", "MoELayer", "RoutingConfig", "SigmoidRouter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """How DeepSeek-V3 chooses experts."""

    num_experts: int
    top_k: int
    num_groups: int
    top_groups: int
    normalize: bool  # make the weights of a token add up to 1, before scaling
    scale: float


class MoELayer(nn.Module):
    """Router, shared experts and routed experts. With one lane this is the plain serial layer."""

    def __init__(self, router: nn.Module, experts: Experts, shared_experts: GatedFeedForward | None) -> None:
        super().__init__()
        self.gate = router
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        routes = self.gate(x_TD)
        sent = self.experts.dispatch(x_TD, routes)
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        rows = finish(sent)  # switch, then wait: the other lane computes while our tokens travel
        back = self.experts.combine(self.experts.compute(rows))
        routed_TD = finish(back)  # switch, then wait
        return routed_TD if shared_TD is None else routed_TD + shared_TD


class SigmoidRouter(nn.Module):
    """Sigmoid scores, a correction bias that only chooses, and a limit on groups (DeepSeek-V3 paper, 2.1.2)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, hidden_size: int, config: RoutingConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.weight = parameter(config.num_experts, hidden_size, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("e_score_correction_bias", torch.empty(config.num_experts, dtype=wide))

    def forward(self, x_TD: torch.Tensor) -> Routes:
        wide = self.e_score_correction_bias.dtype
        scores_TE = F.linear(x_TD.to(wide), self.weight.to(wide)).sigmoid()
        ids_TK = self._allowed(scores_TE + self.e_score_correction_bias).topk(self.config.top_k, sorted=False).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.config.normalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routes(ids_TK, weights_TK * self.config.scale)

    def _allowed(self, choice_TE: torch.Tensor) -> torch.Tensor:
        """Minus infinity for the experts outside the best groups; a group is as good as its best two experts."""
        config = self.config
        if config.top_groups == config.num_groups:
            return choice_TE
        choice_TGe = choice_TE.view(-1, config.num_groups, config.num_experts // config.num_groups)
        group_scores_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
        best_TG = group_scores_TG.topk(config.top_groups, sorted=False).indices
        refused_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_TG, False)
        return choice_TGe.masked_fill(refused_TG.unsqueeze(-1), float("-inf")).flatten(1)


class Experts(nn.Module):
    """This rank's experts, and the transport that brings the tokens to them."""

    def __init__(self, transport: Transport, expert_width: int, *, label: str) -> None:
        super().__init__()
        shape = transport.shape
        self.transport = transport
        self.label = label
        self.width = expert_width
        num_local = transport.experts_per_rank
        self.first_expert = transport.group.rank * num_local
        self.gate_up_EGD = parameter(num_local, 2 * expert_width, shape.hidden_size, dtype=shape.dtype)
        self.down_EDF = parameter(num_local, shape.hidden_size, expert_width, dtype=shape.dtype)

    def dispatch(self, x_TD: torch.Tensor, routes: Routes) -> Pending[Rows]:
        tokens_by_rank = current_micro_batch().tokens_by_rank
        return self.transport.dispatch(x_TD, routes, tokens_by_rank=tokens_by_rank, label=self.label)

    def compute(self, rows: Rows) -> torch.Tensor:
        """Partial sums [R, D] of the rows over this rank's experts."""
        return grouped_experts(
            rows.x_RD, rows.ids_RK, rows.weights_RK, self.gate_up_EGD, self.down_EDF, out_RD=rows.out_RD
        )

    def combine(self, partial_RD: torch.Tensor) -> Pending[torch.Tensor]:
        return self.transport.combine(partial_RD, label=self.label)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint names of this rank's experts, and the views that they fill."""
        for local in range(self.gate_up_EGD.shape[0]):
            name = f"{prefix}{self.first_expert + local}."
            yield name + "gate_proj.weight", self.gate_up_EGD[local, : self.width]
            yield name + "up_proj.weight", self.gate_up_EGD[local, self.width :]
            yield name + "down_proj.weight", self.down_EDF[local]
