"""One step of one rank, in six phases. All ranks run their steps in lockstep.

scheduler ─► agreement ─► splitting ─► lanes ─► sampler ─► scheduler
   batch        plan        parts      hidden    tokens      outputs

On a device that queues its work, a step is prepared and launched while the one before still runs; then the host takes
the tokens of the one before.

    host      prepare n ─ launch n ─ commit n-1 │ prepare n+1 ─ launch n+1 ─ commit n │ ...
    device    ──── step n-1 ────────┤ step n ────────────────────────────┤ step n+1 ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from antiphon.comm import RankGroup, Transport
from antiphon.config.cache import CacheSize
from antiphon.config.graph_sizes import CaptureReport
from antiphon.core.batch import PENDING_TOKEN, Batch, MicroBatch, upload
from antiphon.core.plan import Plan
from antiphon.core.policy import OverlapPolicy
from antiphon.device.device import Reading, StepTimer
from antiphon.engine.graphs.padded_steps import PaddedSteps
from antiphon.engine.runner import Runner
from antiphon.engine.sampling.sampler import Sampler, Sampling
from antiphon.engine.scheduling.request import Request, TokenOutput
from antiphon.engine.scheduling.scheduler import Scheduler
from antiphon.engine.stats import ExpertLoad, StepStats
from antiphon.planning import Planner
from antiphon.splitting import join, split
from antiphon.timeline import StepRecorder


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a call of `step` did. plan: of the step that it launched. outputs: of the steps that it committed."""

    plan: Plan
    outputs: list[TokenOutput]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens the host has not seen. reading: its time on the device, if this queues its work."""

    batch: Batch
    sampling: Sampling
    kind: str  # the plan's
    reading: Reading | None


@dataclass(slots=True, kw_only=True)
class StepEngine:
    """The parts of one rank. An exception inside `step` is fatal, because its peers are already communicating.

    padded: runs the steps without prefill whose size is in the planner's ladders; `None` if there are no such sizes.
    timer: of steps on a device that queues its work; `None` on others.
    """

    group: RankGroup
    scheduler: Scheduler
    planner: Planner
    runner: Runner
    padded: PaddedSteps | None = None
    sampler: Sampler
    transport: Transport
    cache: CacheSize
    attention: str  # the attention backend and the reason
    recorder: StepRecorder
    stats: StepStats
    expert_load: ExpertLoad
    timer: StepTimer | None = None
    captured: CaptureReport = field(default_factory=CaptureReport)
    wave: int = 0  # of the newest message from the frontend
    in_flight: deque[Launched] = field(default_factory=deque)  # at most one between two calls of `step`

    def step(self, new: Iterable[Request] = ()) -> StepResult:
        """Launch one step of the whole group; every rank must call it. new: requests that came since the last step.

        The outputs are those of the step before where the device queues its work, and of this step elsewhere. When the
        plan is idle, nothing is in flight.
        """
        with self._on_compute_stream():
            return self._step(new)

    def _on_compute_stream(self) -> AbstractContextManager[None]:
        """Whatever thread calls, and whatever stream it has made current. A CPU has only one."""
        return nullcontext() if self.timer is None else self.transport.streams.current()

    def _step(self, new: Iterable[Request]) -> StepResult:
        self.scheduler.add(new)
        outputs = self._commit(but=1)  # there are two only after an interrupt
        batch = self.scheduler.next_batch()  # 1 what to run; may be empty
        if not batch.requests and self.in_flight:
            outputs += self._commit()  # what can run may depend on what it has found
            batch = self.scheduler.next_batch()
        plan = self.planner.agree(batch, self.group, wave=self.wave)  # 2 one plan for all ranks
        if plan.is_empty:
            return StepResult(plan, outputs + self._commit())
        self._launch(batch, plan)  # 3, 4 and 5
        synchronous = bool(self.in_flight[-1].sampling.reason)
        outputs += self._commit(but=0 if synchronous else 1)  # 6 of the step before, while this one runs
        return StepResult(plan, outputs)

    def drain(self) -> list[TokenOutput]:
        """Take the tokens of the step in flight, so that nothing is. Blocks the host until it has run.

        Each rank may call it by itself.
        """
        with self._on_compute_stream():
            return self._commit()

    def _launch(self, batch: Batch, plan: Plan) -> None:
        number, kind = self.stats.num_steps, plan.kind
        recording = self.recorder.step(number, kind=kind, num_tokens=batch.num_tokens)
        with recording as timeline, self.expert_load.step(number):
            if plan.graph:
                assert self.padded is not None
                rows = self.padded.fill(batch, plan, self._sources())  # 3 one micro-batch or several, at a fixed size
                self._start_timer()
                self.padded.launch(plan)  # 4 the lanes overlap inside
                timeline.replayed_bytes = self.padded.replayed_bytes(plan)
                sampling = self.sampler.launch(self.padded.hidden_XD, batch, rows=rows, greedy=True)  # 5
            else:
                parts = self._split(batch, plan)  # 3 one micro-batch or several
                self._start_timer()
                policy = self.planner.policy
                layers = slice(policy.start_layer, policy.end_layer)
                hidden = self.runner.run(parts, whole=self._whole(batch, plan), layers=layers)  # 4 the lanes overlap
                sampling = self.sampler.launch(join(hidden), batch)  # 5
        reading = None if self.timer is None else self.timer.stop()
        self.in_flight.append(Launched(batch, sampling, kind, reading))
        self.scheduler.launched(batch)
        replayed = self.padded is not None and self.padded.is_captured(plan)
        self.stats.add(plan, replayed=replayed, synchronous=sampling.reason if self.runs_ahead else "")

    def _commit(self, *, but: int = 0) -> list[TokenOutput]:
        """Take the tokens of all steps in flight but the last `but`. Blocks the host until they have run."""
        outputs: list[TokenOutput] = []
        while len(self.in_flight) > but:
            launched = self.in_flight[0]
            sampled = launched.sampling.wait()
            self.in_flight.popleft()
            outputs += self.scheduler.commit(launched.batch, sampled)
            if launched.reading is not None:
                assert self.timer is not None
                self.stats.add_device_time(launched.kind, self.timer.elapsed_ms(launched.reading))
        return outputs

    def _start_timer(self) -> None:
        if self.timer is not None:
            self.timer.start()

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the tokens of the one before are known."""
        return self.sampler.new_tokens is not None

    def _sources(self) -> Mapping[int, int]:
        return self.in_flight[-1].sampling.sources if self.in_flight else {}

    def _split(self, batch: Batch, plan: Plan) -> list[MicroBatch]:
        """The micro-batches of an eager step, on the device, with all of their token ids."""
        parts = split(batch, plan, block_size=self.scheduler.pool.block_size)
        if not self.in_flight:
            return parts
        streams = self.transport.streams
        pin_memory = streams.owner.pinned_memory
        parts = [part.to(streams.device, pin_memory=pin_memory) for part in parts]
        for part in parts:
            rows, indices = _pending_rows(part, self._sources())
            if rows:
                assert self.sampler.new_tokens is not None
                rows_N, indices_N = upload(
                    [torch.tensor(rows), torch.tensor(indices)], streams.device, pin_memory=pin_memory
                )
                part.token_ids_T.index_copy_(0, rows_N, self.sampler.new_tokens.ids_X[indices_N])
        return parts

    def _whole(self, batch: Batch, plan: Plan) -> MicroBatch | None:
        """The unsplit micro-batch of a split step, if some of its layers run unsplit."""
        if plan.num_lanes == 1 or self.planner.policy.splits_all_layers:
            return None
        (whole,) = self._split(batch, plan.unsplit())
        return whole

    def reconfigure(self, policy: OverlapPolicy) -> None:
        """Use `policy` from the next step on. All ranks must change it between the same steps."""
        self.planner.policy = policy

    def statistics(self) -> dict[str, Any]:
        """Return the counters since the start and the state of the KV cache."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        with self._on_compute_stream():  # behind the steps that count
            expert_tokens = self.expert_load.tokens_by_layer()
        blocks = {"total": pool.num_usable, "free": pool.num_free, "block_size": pool.block_size}
        return {
            **self.stats.to_dict(),
            "overlap": self.recorder.totals.to_dict(),
            **scheduler.stats.to_dict(),
            "kv_blocks": blocks,
            "unfinished": scheduler.num_unfinished,
            "running": scheduler.num_running,
            "expert_tokens": expert_tokens,
        }


def _pending_rows(part: MicroBatch, sources: Mapping[int, int]) -> tuple[Sequence[int], Sequence[int]]:
    """The rows of a micro-batch whose token is pending, and where `NewTokens` has it."""
    rows, indices, end = [], [], 0
    for request in part.requests:
        end += request.query_len
        if request.token_ids[-1] == PENDING_TOKEN:
            rows.append(end - 1)
            indices.append(sources[request.request_id])
    return rows, indices
