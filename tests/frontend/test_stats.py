"""The statistics of an engine are those of its ranks, summed where the ranks differ."""

from __future__ import annotations

from typing import Any

from antiphon.comm import DataPath
from antiphon.config.cache import CacheSize
from antiphon.config.engine_config import EngineConfig
from antiphon.engine.stats import SchedulerStats, StepStats
from antiphon.frontend.stats import EngineStats


def test_what_differs_between_ranks_is_summed_and_the_rest_is_not() -> None:
    config = EngineConfig(ranks=2, device="cpu").resolve()
    config = config.started(
        device_name="A",
        transport_name=config.transport.name,
        data_path=DataPath.HOST,
        cache=CacheSize(num_blocks=4, source="why"),
    )
    stats: dict[str, Any] = {
        **StepStats(2).to_dict(),
        **SchedulerStats(preemptions=2).to_dict(),
        "overlap": {},
        "kv_blocks": {"total": 3, "free": 2, "block_size": 16},
        "unfinished": 1,
        "running": 1,
        "graphs": {"replayed": 5, "padded": 5, "eager_reasons": {"it has prompt tokens": 1}},
        "synchronous_reasons": {"logprobs": 2},
    }
    other = stats | {"synchronous_reasons": {"logprobs": 1, "penalties": 4}}
    found = EngineStats.of(config, config.resolved_policy, [stats, other])
    assert found.synchronous_reasons == {"logprobs": 3, "penalties": 4}
    assert found.graphs == stats["graphs"]  # the same on all ranks
    assert found.preemptions == 4
