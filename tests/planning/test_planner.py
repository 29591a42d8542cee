"""One rank's proposal, and the way from the batches of several ranks to one plan."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.comm import RankGroup
from antiphon.core.batch import Batch, RequestSlice
from antiphon.core.plan import Plan, SerialReason
from antiphon.core.policy import DBO_MODES, SPLIT_RULES, OverlapPolicy
from antiphon.planning import Planner, decide
from antiphon.splitting import split


def batch_of(*shapes: tuple[int, int], rank: int = 0) -> Batch:
    """Requests given as (new tokens, context)."""
    return Batch(
        rank=rank,
        requests=tuple(
            RequestSlice(
                request_id=index, token_ids=(7,) * query, context_len=context, block_ids=tuple(range(1, 1 + 60))
            )
            for index, (query, context) in enumerate(shapes)
        ),
    )


def test_the_offer_cuts_by_the_policy():
    proposal = Planner(OverlapPolicy()).propose(batch_of((10, 0), (5, 3)))
    assert (proposal.num_tokens, proposal.part_tokens, proposal.decode_only) == (15, (7, 8), False)
    assert proposal.refusal is SerialReason.NONE


def test_the_offer_counts_the_tokens_of_prompts():
    """(new tokens, context): a prompt, a part of one, a decode, and a prompt of one token."""
    batch = batch_of((10, 0), (5, 3), (1, 9), (1, 0))
    assert Planner(OverlapPolicy()).propose(batch).num_prefill_tokens == 16
    assert Planner(OverlapPolicy()).propose(batch_of((1, 9), (1, 4))).num_prefill_tokens == 0


def test_the_offer_uses_the_rule_and_the_ratio_of_the_policy():
    batch = batch_of((60, 0), (40, 0))
    strict = OverlapPolicy(split="request-boundary")
    assert Planner(strict).propose(batch).refusal is SerialReason.NO_BOUNDARY
    assert Planner(strict).propose(batch).part_tokens == (100,)
    loose = OverlapPolicy(split="request-boundary", imbalance_ratio=0.2)
    assert Planner(loose).propose(batch).part_tokens == (60, 40)
    assert Planner(OverlapPolicy(split="token", imbalance_ratio=0.0)).propose(batch).part_tokens == (50, 50)


@pytest.mark.parametrize("lanes", [2, 3, 5, 8])
def test_the_offer_has_the_lanes_of_the_policy(lanes):
    assert len(Planner(OverlapPolicy(micro_batches=lanes)).propose(batch_of((40, 0))).part_tokens) == lanes


@pytest.mark.parametrize("split_rule", SPLIT_RULES)
def test_decodes_are_cut_in_the_middle_by_both_rules(split_rule):
    proposal = Planner(OverlapPolicy(split=split_rule, imbalance_ratio=0.0)).propose(batch_of(*[(1, 9)] * 7))
    assert (proposal.decode_only, proposal.part_tokens) == (True, (3, 4))


@pytest.mark.parametrize("shapes", [(), ((1, 4),), ((1, 0),)])
def test_too_few_tokens_are_offered_whole(shapes):
    proposal = Planner(OverlapPolicy(dbo="on")).propose(batch_of(*shapes))
    assert proposal.part_tokens == (len(shapes),)
    assert proposal.refusal is SerialReason.TOO_FEW_TOKENS
    assert not proposal.can_split


def test_off_offers_the_batch_whole():
    proposal = Planner(OverlapPolicy(dbo="off")).propose(batch_of((600, 0)))
    assert proposal.part_tokens == (600,)
    assert not proposal.can_split


def test_wave_and_fingerprint_go_into_the_offer():
    policy = OverlapPolicy(dbo="on")
    proposal = Planner(policy).propose(batch_of((4, 0)), wave=11)
    assert (proposal.wave, proposal.order) == (11, 0)
    others = [
        Planner(OverlapPolicy(dbo="on")),
        Planner(OverlapPolicy(dbo="off")),
        Planner(policy, {1: (4, 8)}),
        Planner(policy, {1: (4,)}),
    ]
    fingerprints = [planner.propose(batch_of((4, 0))).policy for planner in others]
    assert fingerprints[0] == proposal.policy
    assert len(set(fingerprints)) == 4, "ranks that pad to other sizes decide otherwise"
    assert Planner(policy).propose(batch_of((4, 0))).wave == 0


def test_the_planner_decides_by_its_present_policy():
    planner, group, batch = Planner(OverlapPolicy(dbo="off")), RankGroup(rank=0, size=1), batch_of((40, 0))
    assert planner.agree(batch, group).kind == "serial"
    planner.policy = OverlapPolicy(dbo="on")
    assert planner.agree(batch, group).kind == "dual"
    assert planner.agree(batch, group) == decide([planner.propose(batch)], planner.policy)


shapes = st.lists(st.tuples(st.sampled_from([1, 1, 2, 7, 40]), st.integers(0, 9)), max_size=8)
policies = st.builds(
    OverlapPolicy,
    dbo=st.sampled_from(DBO_MODES),
    split=st.sampled_from(SPLIT_RULES),
    micro_batches=st.integers(2, 8),
    prefill_threshold=st.none() | st.integers(0, 60),
    decode_threshold=st.none() | st.integers(0, 8),
    imbalance_ratio=st.floats(0, 1),
)


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=4), policies)
def test_every_plan_can_be_split_on_every_rank(shapes_by_rank, policy):
    """From batches to micro-batches: each rank gets its tokens in the lanes that all ranks have."""
    batches = [batch_of(*rank_shapes, rank=rank) for rank, rank_shapes in enumerate(shapes_by_rank)]
    plan = decide([Planner(policy).propose(batch) for batch in batches], policy)
    parts_by_rank = [split(batch, plan, block_size=4) for batch in batches]
    assert {len(parts) for parts in parts_by_rank} == {plan.num_lanes}
    for batch, parts in zip(batches, parts_by_rank, strict=True):
        assert sum(part.num_tokens for part in parts) == batch.num_tokens
    if any(shapes_by_rank):
        for lane in range(plan.num_lanes):
            tokens = tuple(parts[lane].num_tokens for parts in parts_by_rank)
            assert any(tokens)
            assert all(parts[lane].rows_by_rank == tokens for parts in parts_by_rank)
    assert plan.idle is not any(shapes_by_rank)


def plan_of(shapes_by_rank: list[list[tuple[int, int]]], policy: OverlapPolicy) -> Plan:
    batches = [batch_of(*rank_shapes, rank=rank) for rank, rank_shapes in enumerate(shapes_by_rank)]
    return decide([Planner(policy).propose(batch) for batch in batches], policy)


@pytest.mark.parametrize("dbo", ["on", "auto"])
def test_many_prompts_beside_a_long_one_are_not_split_between_requests(dbo):
    """Cut between requests, rank 1 cannot be cut: 8,000 + 4,096 tokens one after another, where serial has 8,192."""
    shapes_by_rank = [[(512, 0)] * 16, [(8000, 0)]]
    plan = plan_of(shapes_by_rank, OverlapPolicy(dbo=dbo, split="request-boundary"))
    assert (plan.kind, plan.reason) == ("serial", "lanes are uneven across ranks")
    assert "12096 tokens" in str(plan) and "8192 tokens on rank 0" in str(plan)
    anywhere = plan_of(shapes_by_rank, OverlapPolicy(dbo=dbo, split="token"))
    assert anywhere.part_tokens == ((4096, 4096), (4000, 4000))


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=4), st.integers(2, 8), st.floats(0, 1))
def test_cut_anywhere_lanes_are_never_uneven(shapes_by_rank, lanes, ratio):
    """So `imbalance_ratio` has no effect there, as `OverlapPolicy.without_effect` says."""
    policy = OverlapPolicy(dbo="on", micro_batches=lanes, imbalance_ratio=ratio)
    assert plan_of(shapes_by_rank, policy).reason != "lanes are uneven across ranks"


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=4), st.floats(0, 0.5))
def test_what_the_rule_may_cut_is_never_refused_as_uneven(shapes_by_rank, ratio):
    policy = OverlapPolicy(dbo="on", split="request-boundary", imbalance_ratio=ratio)
    offers = [Planner(policy).propose(batch_of(*rank_shapes)) for rank_shapes in shapes_by_rank]
    if all(offer.can_split for offer in offers):
        assert decide(offers, policy).kind == "dual"
