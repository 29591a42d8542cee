"""Counts of an engine since its start, summed over its ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from antiphon.config.engine_config import ResolvedConfig
from antiphon.planning import ResolvedPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What `LLM.stats` returns. `stats["steps"]` is `stats.steps`; `to_dict()` can be written as JSON.

    steps, steps_by_plan (plan -> steps), serial_reasons (reason -> steps): the same on all ranks. last_plan: the last
    plan in words, with its numbers.
    overlap: plan -> seconds of rank 0 (`time_s`, `communication_s`, `hidden_s`, `exposed_s`) and `num_bytes`. On GPUs,
    where the host only queues work and does not see data arrive, the middle three are `None`.
    graphs: steps that were replayed from a graph (`replayed`) or padded to a fixed size (`padded`), and why the others
    were eager (`eager_reasons`: reason -> steps); the same on all ranks.
    device_seconds: plan -> time of rank 0's steps, on a device that queues its work.
    Summed over ranks: synchronous_reasons (reason -> steps after which the host had to wait), kv_blocks, unfinished and
    running requests, preemptions, and prefix_cache (tokens of admitted texts, and how many of them were found; a
    preempted request is admitted again).
    kv_cache: tokens per rank, and where the size comes from. dbo_reason: what `auto` chose, and why.
    """

    steps: int
    steps_by_plan: dict[str, int]
    serial_reasons: dict[str, int]
    graphs: dict[str, Any]
    device_seconds: dict[str, float]
    synchronous_reasons: dict[str, int]
    overlap: dict[str, dict[str, Any]]
    kv_blocks: dict[str, int]
    unfinished: int
    running: int
    preemptions: int
    prefix_cache: dict[str, int]
    kv_cache: dict[str, Any]
    ranks: int
    device: str
    transport: str
    dbo: str
    dbo_reason: str
    last_plan: str

    @staticmethod
    def of(config: ResolvedConfig, policy: ResolvedPolicy, by_rank: Sequence[dict[str, Any]]) -> EngineStats:
        """Make it from `StepEngine.statistics` of every rank. policy: the current one."""
        first = by_rank[0]
        blocks = {name: sum(rank["kv_blocks"][name] for rank in by_rank) for name in ("total", "free")}
        cached = {name: sum(rank["prefix_cache"][name] for rank in by_rank) for name in first["prefix_cache"]}
        synchronous: Counter[str] = Counter()
        for rank in by_rank:
            synchronous.update(rank["synchronous_reasons"])
        return EngineStats(
            steps=first["steps"],
            steps_by_plan=first["steps_by_plan"],
            serial_reasons=first["serial_reasons"],
            graphs=first["graphs"],
            device_seconds=first["device_seconds"],
            synchronous_reasons=dict(synchronous),
            overlap=first["overlap"],
            kv_blocks={**blocks, "block_size": first["kv_blocks"]["block_size"]},
            unfinished=sum(rank["unfinished"] for rank in by_rank),
            running=sum(rank["running"] for rank in by_rank),
            preemptions=sum(rank["preemptions"] for rank in by_rank),
            prefix_cache=cached,
            kv_cache=config.cache_facts(),
            ranks=config.options.ranks,
            device=config.device_name,
            transport=str(config.transport),
            dbo=policy.policy.dbo,
            dbo_reason=policy.reason,
            last_plan=first["last_plan"],
        )

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as plain values."""
        return asdict(self)
