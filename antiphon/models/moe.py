"""The MoE layer: the one place where lanes overlap.

Shapes: `T` tokens, `D` hidden size, `E` experts, `K` experts per token, `R` rows received, `F` expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from antiphon.comm import Routes, Rows, Transport
from antiphon.core.batch import current_micro_batch
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_experts
from antiphon.models.layers import GatedFeedForward, checkpoint_tensors, parameter
from antiphon.runtime import Pending, finish


@dataclass(frozen=True, slots=True, kw_only=True)
class MoENames:
    """The names that a checkpoint uses for the layer and the parts of an expert."""

    layer: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


_USUAL_NAMES = MoENames()


class MoELayer(nn.Module):
    """Router, shared experts and routed experts. With one lane this is the plain serial layer."""

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        shared_experts: GatedFeedForward | None,
        *,
        names: MoENames = _USUAL_NAMES,
    ) -> None:
        super().__init__()
        self.names = names
        self.gate = router
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sums over the routed experts and the output of the shared ones, if any; the next norm adds the two."""
        num_real_1 = current_micro_batch().num_real_1
        routes = self.gate(x_TD, num_real_1)
        sent = self.experts.dispatch(x_TD, routes)
        shared_TD = None if self.shared_experts is None else self.shared_experts.forward(x_TD)
        rows = finish(sent)  # switch, then wait: the other lane computes while our tokens travel
        back = self.experts.combine(self.experts.compute(rows))
        routed_TD = finish(back)  # switch, then wait
        return routed_TD, shared_TD  # the next norm adds them

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """See `InParts`."""
        return checkpoint_tensors(self, f"{prefix}{self.names.layer}.")


class Experts(nn.Module):
    """This rank's experts, and the transport that brings the tokens to them."""

    def __init__(
        self,
        transport: Transport,
        expert_width: int,
        workspace: ExpertWorkspace | None = None,
        *,
        label: str,
        names: MoENames = _USUAL_NAMES,
    ) -> None:
        super().__init__()
        shape = transport.shape
        self.transport = transport
        self.workspace = workspace
        self.label = label
        self.names = names
        self.width = expert_width
        num_local = transport.experts_per_rank
        self.first_expert = transport.group.rank * num_local  # its group is the ep axis of the mesh
        self.gate_up_EGD = parameter(num_local, 2 * expert_width, shape.hidden_size, dtype=shape.dtype)
        self.down_EDF = parameter(num_local, shape.hidden_size, expert_width, dtype=shape.dtype)

    def dispatch(self, x_TD: torch.Tensor, routes: Routes) -> Pending[Rows]:
        rows_by_rank = current_micro_batch().rows_by_rank
        return self.transport.dispatch(x_TD, routes, tokens_by_rank=rows_by_rank, label=self.label)

    def compute(self, rows: Rows) -> torch.Tensor:
        """Partial sums [R, D] of the rows over this rank's experts."""
        return grouped_experts(
            rows.x_RD,
            rows.global_ids_RK,
            rows.weights_RK,
            self.gate_up_EGD,
            self.down_EDF,
            out_RD=rows.out_RD,
            first_expert=rows.first_expert,
            workspace=self.workspace,
        )

    def combine(self, partial_RD: torch.Tensor) -> Pending[torch.Tensor]:
        return self.transport.combine(partial_RD, label=self.label)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint names of this rank's experts, and the views that they fill; see `InParts`."""
        for local in range(self.gate_up_EGD.shape[0]):
            name = f"{prefix}experts.{self.first_expert + local}."
            yield f"{name}{self.names.gate}.weight", self.gate_up_EGD[local, : self.width]
            yield f"{name}{self.names.up}.weight", self.gate_up_EGD[local, self.width :]
            yield f"{name}{self.names.down}.weight", self.down_EDF[local]
