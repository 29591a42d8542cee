"""Captured steps of whole engines without a GPU: what is captured, replayed and counted, and what auto measures."""

from __future__ import annotations

import pytest

from antiphon.comm import RankGroup
from tests.engine.test_running_ahead import AHEAD, BLOCK_BYTES, SIZES, alike
from tests.engine.traffic import Traffic, of_engines
from tests.support.fake_graphs import fake_graphs, of_engines_that_capture
from tests.support.ranks import run_ranks

TRAFFIC = Traffic(seed=4, num_requests=24, vocab_size=300, most_tokens=24)
CAPTURED = AHEAD | {"cuda_graph_sizes": SIZES}


def test_replays_give_the_texts_of_eager_steps() -> None:
    group = RankGroup(rank=0, size=1)
    (eager,) = of_engines(group, TRAFFIC, [{"device": "cpu"}])
    small_cache = {"kv_cache_memory": 5 * BLOCK_BYTES, "prefix_caching": False}
    arms = [CAPTURED, CAPTURED | {"dbo": "on"}, CAPTURED | small_cache]
    for captured in of_engines_that_capture(group, TRAFFIC, arms):
        alike(eager["tokens"], captured["tokens"])
        graphs, steps = captured["stats"]["graphs"], captured["stats"]["steps"]
        assert graphs["replayed"] == graphs["padded"] > 10
        assert graphs["eager_reasons"] == {"it has prompt tokens": steps - graphs["replayed"]}
        assert captured["stats"]["device_seconds"]
    assert captured["stats"]["preemptions"]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_capture_that_fails_inside_a_layer_costs_only_its_size(fails_at: int) -> None:
    group = RankGroup(rank=0, size=1)
    (eager,) = of_engines(group, TRAFFIC, [{"device": "cpu"}])
    with fake_graphs(fails_at=fails_at, inside=True) as graphs:
        (captured,) = of_engines(group, TRAFFIC, [CAPTURED])
    alike(eager["tokens"], captured["tokens"])
    assert len(graphs) == len(SIZES.split(",")) - 1
    assert captured["stats"]["graphs"]["replayed"] > 5


def test_what_cannot_be_captured_says_why() -> None:
    (eager,) = of_engines_that_capture(RankGroup(rank=0, size=1), TRAFFIC, [CAPTURED | {"enforce_eager": True}])
    assert eager["stats"]["graphs"]["replayed"] == 0
    assert eager["stats"]["graphs"]["eager_reasons"]["enforce_eager is set"]


@pytest.mark.processes
def test_two_ranks_replay_measure_and_agree() -> None:
    """auto measures both plans; the ranks choose alike, and the texts are those of serial steps."""
    arms = [CAPTURED | {"transport": "allgather", "dbo": dbo} for dbo in ("off", "on", "auto")]
    for found in run_ranks("tests.support.fake_graphs:of_engines_that_capture", 2, TRAFFIC, arms):
        off, on, auto = found
        for one in (on, auto):
            alike(off["tokens"], one["tokens"])
            assert one["stats"]["graphs"]["replayed"] > 5
        assert on["stats"]["steps_by_plan"]["dual"]
        reasons = auto["stats"]["serial_reasons"]
        measured = auto["stats"]["steps_by_plan"]["dual"] + reasons.get("serial measured faster", 0)
        assert measured == auto["stats"]["graphs"]["replayed"], reasons
        assert "overlap" in off["stats"] and off["stats"]["overlap"]["serial"]["num_bytes"] > 0


@pytest.mark.processes
def test_a_size_that_one_rank_cannot_capture_is_captured_on_none() -> None:
    arms = [CAPTURED | {"transport": "allgather"}]
    found = run_ranks("tests.support.fake_graphs:of_engines_that_capture", 2, TRAFFIC, arms, [-1, 2])
    stats = [one["stats"] for (one,) in found]
    assert stats[0]["graphs"] == stats[1]["graphs"]
    # The two largest sizes are captured before: 12 and 8 rows. Larger steps than those do not come.
    assert stats[0]["graphs"]["replayed"] > 5


@pytest.mark.processes
def test_a_transport_that_cannot_be_captured_leaves_all_steps_eager() -> None:
    arms = [CAPTURED | {"transport": "alltoall"}]
    for (one,) in run_ranks("tests.support.fake_graphs:of_engines_that_capture", 2, TRAFFIC, arms):
        graphs = one["stats"]["graphs"]
        assert graphs["replayed"] == graphs["padded"] == 0
        assert any("the host reads the counts" in reason for reason in graphs["eager_reasons"])
