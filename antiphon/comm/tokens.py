"""The types that transports work with: the shape of the experts, the routes of tokens, and the rows received.

Shapes: `T` tokens of this rank, `D` hidden size, `K` experts per token, `R` rows received, `W` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.core.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What a transport needs to know about a model's experts. Rank r of W holds experts r*E/W to (r+1)*E/W - 1."""

    num_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the routing weights: float32, or float64 for a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    def experts_per_rank(self, num_ranks: int) -> int:
        """The number of experts on each rank. Raises `OptionError` if they cannot be divided evenly."""
        if num_ranks < 1 or self.num_experts % num_ranks:
            fitting = [str(n) for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise OptionError(
                f"num_experts={self.num_experts} is not divisible by ranks={num_ranks}",
                remedy=f"use one of {', '.join(fitting)}",
                option="ranks",
                value=num_ranks,
            )
        return self.num_experts // num_ranks


@dataclass(frozen=True, slots=True)
class Routes:
    """The experts that a router chose for each token: expert ids [T, K] (int64) and weights [T, K].

    The ids of a row are distinct, or all -1 for a padding row, which no expert computes and whose sum is zero.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class Rows:
    """What a rank received: tokens, their experts and weights. The tensors may be strided, with gaps between rows.

    global_ids_RK: model-wide expert ids, or -1; this rank holds the `num_experts` from `first_expert` on.
    ids_RK: the same as indices on this rank (int64), -1 for other ranks' experts; computed on first access.
    out_RD: where the partial sums may be written to save `combine` a copy; `None` if there is no such place.
    """

    __slots__ = ("_ids_RK", "first_expert", "global_ids_RK", "num_experts", "out_RD", "weights_RK", "x_RD")

    def __init__(
        self,
        x_RD: torch.Tensor,
        global_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
        out_RD: torch.Tensor | None = None,
        *,
        first_expert: int = 0,
        num_experts: int,
    ) -> None:
        self.x_RD = x_RD
        self.global_ids_RK = global_ids_RK
        self.weights_RK = weights_RK
        self.out_RD = out_RD
        self.first_expert = first_expert
        self.num_experts = num_experts
        self._ids_RK: torch.Tensor | None = None

    @property
    def ids_RK(self) -> torch.Tensor:
        if self._ids_RK is None:
            local = self.global_ids_RK.to(torch.int64) - self.first_expert
            self._ids_RK = local.masked_fill_((local < 0) | (local >= self.num_experts), -1)
        return self._ids_RK
