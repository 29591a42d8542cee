"""Decode steps measured at the start: which sizes are split, and who decides when."""

from __future__ import annotations

import pytest

from antiphon.core.plan import Proposal
from antiphon.core.policy import MEASURED, NEVER, OverlapPolicy
from antiphon.planning import Planner, decide
from antiphon.planning.measured import MeasuredDecode, combine

# Split wins at 64 and 256 sequences on the slowest rank.
BY_RANK = [
    [(16, 10.0, 12.0), (64, 15.0, 13.0), (128, 20.0, 19.0), (256, 30.0, 25.0)],
    [(16, 11.0, 11.5), (64, 14.0, 14.5), (128, 18.0, 21.0), (256, 31.0, 26.0)],
]
AUTO = OverlapPolicy(prefill_threshold=4096, decode_threshold=MEASURED)


@pytest.fixture
def measured() -> MeasuredDecode:
    found = combine(BY_RANK)
    assert found is not None
    return found


def offers(*counts: int, prefill: int = 0) -> list[Proposal]:
    return [
        Proposal(
            num_tokens=count,
            decode_only=not prefill,
            part_tokens=(count // 2, count - count // 2) if count > 1 else (count,),
            num_prefill_tokens=prefill,
        )
        for count in counts
    ]


def test_the_slowest_rank_counts(measured: MeasuredDecode) -> None:
    assert [(size.serial_ms, size.split_ms) for size in measured.sizes] == [(11, 12), (15, 14.5), (20, 21), (31, 26)]
    assert measured.describe() == "split at 64, 256 sequences"
    assert combine([[], []]) is None


@pytest.mark.parametrize(
    ("counts", "kind"),
    [((3, 16), "serial"), ((17, 2), "dual"), ((64, 64), "dual"), ((65, 0), "serial"), ((900, 1), "dual")],
)
def test_a_step_is_as_the_next_measured_size(measured: MeasuredDecode, counts: tuple[int, ...], kind: str) -> None:
    ladders = {1: (16, 64, 128, 256), 2: (8, 32, 64, 128)}
    policy = OverlapPolicy(prefill_threshold=4096, decode_threshold=MEASURED, imbalance_ratio=1.0)
    plan = decide(offers(*counts), policy, ladders, measured)
    assert plan.kind == kind
    assert plan.reason == ("dual measured faster" if kind == "dual" else "serial measured faster")
    size = measured.nearest(max(counts))
    assert f"{size.serial_ms:.2f} ms serial" in plan.detail


def test_prompts_go_by_their_threshold(measured: MeasuredDecode) -> None:
    assert decide(offers(64, 64, prefill=10), AUTO, measured=measured).reason != "dual measured faster"
    assert decide(offers(5000, 5000, prefill=4990), AUTO, measured=measured).kind == "dual"


@pytest.mark.parametrize(
    "policy", [OverlapPolicy(dbo="off"), OverlapPolicy(dbo="on"), OverlapPolicy(decode_threshold=NEVER)]
)
def test_what_the_user_asks_for_goes_before(measured: MeasuredDecode, policy: OverlapPolicy) -> None:
    for count in (16, 64):
        plan = decide(offers(count, count), policy, measured=measured)
        assert plan == decide(offers(count, count), policy)


def test_without_measurements_no_decode_step_is_split() -> None:
    assert decide(offers(64, 64), AUTO).kind == "serial"


def test_ranks_with_other_measurements_run_under_other_policies(measured: MeasuredDecode) -> None:
    batch_policy = [Planner(AUTO, {}, one)._fingerprint() for one in (measured, None, measured)]
    assert batch_policy[0] == batch_policy[2] != batch_policy[1]
