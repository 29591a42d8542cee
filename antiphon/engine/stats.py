"""Counters of one rank since it started."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from antiphon.core.plan import EagerReason, Plan, plan_kind
from antiphon.kernels.router import PairCounts
from antiphon.models import CausalLM
from antiphon.models.checkpoint.dummy_routing import RouteTable, TableRouter
from antiphon.models.moe import MoELayer
from antiphon.models.router import Router


@dataclass(slots=True)
class SchedulerStats:
    """Counts of preemptions, of tokens in admitted requests, and of those found in the prefix cache.

    A request that comes back after a preemption is admitted, and counted, again.
    """

    preemptions: int = 0
    admitted_tokens: int = 0
    hit_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "preemptions": self.preemptions,
            "prefix_cache": {"admitted_tokens": self.admitted_tokens, "hit_tokens": self.hit_tokens},
        }


class StepStats:
    """Counts steps by plan, serial steps by reason, and how steps were launched.

    obstacle: why nothing is captured; "" if something is (`CaptureReport.obstacle`).
    """

    def __init__(self, micro_batches: int, *, obstacle: str = "") -> None:
        self._obstacle = obstacle
        self._by_plan: Counter[str] = Counter({"serial": 0, plan_kind(micro_batches): 0})
        self._serial_reasons: Counter[str] = Counter()
        self._eager_reasons: Counter[str] = Counter()
        self._synchronous_reasons: Counter[str] = Counter()
        self._num_replayed = self._num_padded = 0
        self._device_s: dict[str, float] = defaultdict(float)
        self._last_plan = ""
        self.num_steps = 0

    def add(self, plan: Plan, *, replayed: bool = False, synchronous: str = "") -> None:
        """Count a step that was launched. synchronous: why the host had to wait for its tokens at once, if it had."""
        self.num_steps += 1
        self._by_plan[plan.kind] += 1
        if plan.num_lanes == 1:
            self._serial_reasons[plan.reason] += 1
        self._num_replayed += replayed
        self._num_padded += bool(plan.graph)
        if not replayed:
            self._eager_reasons[self._eager_reason(plan)] += 1
        if synchronous:
            self._synchronous_reasons[synchronous] += 1
        self._last_plan = str(plan)

    def add_device_time(self, plan_kind: str, milliseconds: float) -> None:
        """Add the time of a step on a device that queues its work, from its first kernel to its last."""
        self._device_s[plan_kind] += milliseconds * 1e-3

    def _eager_reason(self, plan: Plan) -> str:
        """Why a step was launched kernel by kernel. A padded step, and one without sizes, may only lack its graph."""
        if self._obstacle and plan.eager in (EagerReason.NONE, EagerReason.NO_SIZES):
            return self._obstacle
        return plan.eager.text

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.num_steps,
            "steps_by_plan": dict(self._by_plan),
            "serial_reasons": dict(self._serial_reasons),
            "last_plan": self._last_plan,
            "graphs": {
                "replayed": self._num_replayed,
                "padded": self._num_padded,
                "eager_reasons": dict(self._eager_reasons),
            },
            "synchronous_reasons": dict(self._synchronous_reasons),
            "device_seconds": dict(self._device_s),
        }


_COUNTED_EVERY = 64  # steps


class ExpertLoad:
    """Counts pairs of a token of this rank and an expert, by layer and by the rank of the expert.

    Padding is not counted. num_experts: of the whole model; each of `num_ranks` ranks holds an equal share, in order.
    Captured steps count by a switch on the device, so that a replay counts in some steps and not in others.
    """

    def __init__(self, model: CausalLM | nn.Module, *, num_experts: int, num_ranks: int, device: torch.device) -> None:
        modules = model.modules() if isinstance(model, nn.Module) else ()
        routers = [module.gate for module in modules if isinstance(module, MoELayer)]
        self._num_ranks, self._experts_per_rank = num_ranks, num_experts // num_ranks
        self._counts_LE = torch.zeros(len(routers), num_experts, dtype=torch.int64, device=device)
        self._switch_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self._counters: list[tuple[Router | RouteTable, PairCounts]] = []
        for layer, router in enumerate(routers):
            self._add(layer, router)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wrap step `number`. Only every 64th step is counted."""
        if number % _COUNTED_EVERY:
            yield
            return
        self._switch_1.fill_(1)
        try:
            with self.attached():
                yield
        finally:
            self._switch_1.zero_()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make routers count inside the context, if the switch is on. A step that is captured inside always asks it."""
        for counter, counts in self._counters:
            counter.counts = counts
        try:
            yield
        finally:
            for counter, _ in self._counters:
                counter.counts = None

    def tokens_by_layer(self) -> list[list[int]]:
        """The pairs counted since the start, as [layer][rank]. Waits for the device."""
        sums_LW = self._counts_LE.view(len(self._counts_LE), self._num_ranks, self._experts_per_rank).sum(2)
        found: list[list[int]] = sums_LW.tolist()
        return found

    def _add(self, layer: int, router: nn.Module) -> None:
        """Find what counts for this layer: its router, or the table that it shares with the layers before it."""
        if isinstance(router, TableRouter):
            users = router.table.num_users
            if router.first:  # tables are shared by all layers or by none
                counts = PairCounts(self._counts_LE[layer : layer + users], self._switch_1)
                self._counters.append((router.table, counts))
        else:
            assert isinstance(router, Router), f"{type(router).__name__} cannot count"
            self._counters.append((router, PairCounts(self._counts_LE[layer], self._switch_1)))
