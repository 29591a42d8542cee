"""One step of one rank, in six phases. All ranks run their steps in lockstep.

scheduler ─► agreement ─► splitting ─► lanes ─► sampler ─► scheduler
   batch        plan        parts      hidden    tokens      outputs
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from antiphon.comm import RankGroup, Transport
from antiphon.config.cache import CacheSize
from antiphon.core.batch import Batch, MicroBatch
from antiphon.core.plan import Plan
from antiphon.core.policy import OverlapPolicy
from antiphon.engine.runner import Runner
from antiphon.engine.sampling.sampler import Sampler
from antiphon.engine.scheduling.request import Request, TokenOutput
from antiphon.engine.scheduling.scheduler import Scheduler
from antiphon.engine.stats import ExpertLoad, StepStats
from antiphon.planning import Planner
from antiphon.splitting import join, split
from antiphon.timeline import StepRecorder


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did. There are no outputs if no rank had work."""

    plan: Plan
    outputs: list[TokenOutput]


@dataclass(slots=True, kw_only=True)
class StepEngine:
    """The parts of one rank. An exception inside `step` is fatal, because its peers are already communicating."""

    group: RankGroup
    scheduler: Scheduler
    planner: Planner
    runner: Runner
    sampler: Sampler
    transport: Transport
    cache: CacheSize
    attention: str  # the attention backend and the reason
    recorder: StepRecorder
    stats: StepStats
    expert_load: ExpertLoad
    wave: int = 0  # of the newest message from the frontend

    def step(self, new: Iterable[Request] = ()) -> StepResult:
        """Run one step of the whole group; every rank must call it. new: requests that came since the last step."""
        self.scheduler.add(new)
        batch = self.scheduler.next_batch()  # 1 what to run; may be empty
        plan = self.planner.agree(batch, self.group, wave=self.wave)  # 2 one plan for all ranks
        if plan.is_empty:
            return StepResult(plan, [])
        number = self.stats.num_steps
        with (
            self.recorder.step(number, kind=plan.kind, num_tokens=batch.num_tokens),
            self.expert_load.step(number),
        ):
            parts = split(batch, plan, block_size=self.scheduler.pool.block_size)  # 3 one micro-batch or several
            policy = self.planner.policy
            layers = slice(policy.start_layer, policy.end_layer)
            hidden = self.runner.run(parts, whole=self._whole(batch, plan), layers=layers)  # 4 the lanes overlap here
        sampled = self.sampler(join(hidden), batch)  # 5
        self.stats.add(plan)
        return StepResult(plan, self.scheduler.commit(batch, sampled))  # 6

    def _whole(self, batch: Batch, plan: Plan) -> MicroBatch | None:
        """The unsplit micro-batch of a split step, if some of its layers run unsplit."""
        if plan.num_lanes == 1 or self.planner.policy.splits_all_layers:
            return None
        (whole,) = split(batch, plan.unsplit(), block_size=self.scheduler.pool.block_size)
        return whole

    def reconfigure(self, policy: OverlapPolicy) -> None:
        """Use `policy` from the next step on. All ranks must change it between the same steps."""
        self.planner.policy = policy

    def statistics(self) -> dict[str, Any]:
        """Return the counters since the start and the state of the KV cache."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        blocks = {"total": pool.num_usable, "free": pool.num_free, "block_size": pool.block_size}
        return {
            **self.stats.to_dict(),
            "overlap": self.recorder.totals.to_dict(),
            **scheduler.stats.to_dict(),
            "kv_blocks": blocks,
            "unfinished": scheduler.num_unfinished,
            "running": scheduler.num_running,
            "expert_tokens": self.expert_load.tokens_by_layer(),
        }
