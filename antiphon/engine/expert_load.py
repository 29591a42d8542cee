"""How evenly tokens spread over the ranks of their experts: counted on the device, in a few steps.

Every 64th step each router's choices are added up, so that a step pays for it rarely; a step that is not counted pays
nothing. The host reads the counts when somebody asks, between two steps.

Shapes: `T` tokens, `K` experts per token, `E` experts, `L` layers with experts, `W` ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from antiphon.comm import Routes
from antiphon.models import CausalLM
from antiphon.models.moe import MoELayer

_EVERY = 64  # steps


class ExpertLoad:
    """Pairs of a token of this rank and an expert, by layer and rank of the expert.

    num_experts: of the whole model; rank r of `num_ranks` holds the r-th equal part of them.
    """

    def __init__(self, model: CausalLM | nn.Module, *, num_experts: int, num_ranks: int, device: torch.device) -> None:
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self._routers = [module.gate for module in modules if isinstance(module, MoELayer)]
        self._num_ranks, self._experts_per_rank = num_ranks, num_experts // num_ranks
        self._counts_LE = torch.zeros(len(self._routers), num_experts, dtype=torch.int64, device=device)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step: count it, if it is its turn."""
        if number % _EVERY:
            yield
            return
        hooks = [router.register_forward_hook(self._counter(place)) for place, router in enumerate(self._routers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def tokens_by_layer(self) -> list[list[int]]:
        """Pairs counted since the start: [L][W]. Waits for the device."""
        sums_LW = self._counts_LE.view(len(self._routers), self._num_ranks, self._experts_per_rank).sum(2)
        found: list[list[int]] = sums_LW.tolist()
        return found

    def _counter(self, layer: int):  # type: ignore[no-untyped-def]  # torch's hooks have no useful type
        counts_E = self._counts_LE[layer]

        def count(_router: nn.Module, _inputs: object, routes: Routes) -> None:
            ids_X = routes.ids_TK.flatten().to(torch.int64)
            counts_E.index_add_(0, ids_X, torch.ones_like(ids_X))  # bincount would make the host wait

        return count
