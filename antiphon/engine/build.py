"""Puts the parts of one rank together."""

from __future__ import annotations

from pathlib import Path

from antiphon.comm import RankGroup, create_transport
from antiphon.engine.config import ResolvedConfig
from antiphon.engine.kv_cache import BlockPool, allocate_cache
from antiphon.engine.runner import Runner
from antiphon.engine.sampler import Sampler
from antiphon.engine.scheduler import Scheduler
from antiphon.engine.stats import StepStats
from antiphon.engine.step import StepEngine
from antiphon.models import Checkpoint, build_model, expert_shape, load_weights
from antiphon.planning import Planner
from antiphon.runtime import CpuStreams
from antiphon.timeline import StepRecorder

__all__ = ["build_engine"]


def build_engine(config: ResolvedConfig, group: RankGroup) -> StepEngine:
    """Load this rank's weights, allocate its cache, and make its step engine."""
    options = config.options
    streams = CpuStreams()
    transport = create_transport(
        config.transport,
        expert_shape(config.model, config.dtype),
        group=group,
        streams=streams,
        num_lanes=options.policy.micro_batches,
    )
    model = build_model(config.model, transport)
    load_weights(Checkpoint(Path(options.model)), model.checkpoint_tensors())
    model.bind_kv_cache(
        allocate_cache(config.model, num_blocks=config.num_blocks, block_size=options.block_size, dtype=config.dtype)
    )
    if options.debug_order:
        group.record_order()
    scheduler = Scheduler(
        BlockPool(config.num_blocks, options.block_size),
        rank=group.rank,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=config.model.eos_token_ids,
    )
    recorder = StepRecorder()
    return StepEngine(
        group=group,
        scheduler=scheduler,
        planner=Planner(options.policy),
        runner=Runner(model, streams=streams, recorder=recorder),
        sampler=Sampler(model.logits, scheduler.requests),
        transport=transport,
        recorder=recorder,
        stats=StepStats(options.policy.micro_batches),
    )
