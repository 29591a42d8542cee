"""The row by which ranks agree, and the plan that all of them compute."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.plan import MAX_LANES, ROW_SIZE, Plan, Proposal, SerialReason, plan_kind

counts = st.integers(0, 2**40)
words = st.integers(0, 2**63 - 1)

proposals = st.builds(
    Proposal,
    num_tokens=counts,
    decode_only=st.booleans(),
    num_prefill_tokens=counts,
    part_tokens=st.lists(counts, min_size=1, max_size=MAX_LANES).map(tuple),
    refusal=st.sampled_from(SerialReason),
    wave=words,
    policy=words,
    order=words,
)

ALL_DIFFERENT = Proposal(
    num_tokens=50, decode_only=True, part_tokens=(20, 30), refusal=SerialReason.NO_BOUNDARY, wave=7, policy=8, order=9
)


@settings(deadline=None)
@given(proposals)
def test_a_row_brings_every_field_back(proposal):
    row = proposal.to_row()
    assert len(row) == ROW_SIZE
    assert all(type(word) is int for word in row)
    assert Proposal.from_row(torch.tensor(row, dtype=torch.int64).tolist()) == proposal


@settings(deadline=None)
@given(proposals)
def test_types_come_back_too(proposal):
    copy = Proposal.from_row(proposal.to_row())
    for field in fields(Proposal):
        assert type(getattr(copy, field.name)) is type(getattr(proposal, field.name)), field.name


@pytest.mark.parametrize("field", [field.name for field in fields(Proposal)])
def test_every_field_is_in_the_row(field):
    other = {"decode_only": False, "part_tokens": (20, 31), "refusal": SerialReason.NONE}.get(field, 1234)
    assert replace(ALL_DIFFERENT, **{field: other}).to_row() != ALL_DIFFERENT.to_row()


@pytest.mark.parametrize(("part_tokens", "can_split"), [((50,), False), ((20, 30), True), ((10,) * MAX_LANES, True)])
def test_a_proposal_can_split_from_two_parts_on(part_tokens, can_split):
    assert replace(ALL_DIFFERENT, part_tokens=part_tokens).can_split is can_split


@pytest.mark.parametrize("refusal", SerialReason)
def test_every_refusal_has_a_text_of_its_own(refusal):
    others = {other.text for other in SerialReason if other is not refusal}
    assert refusal.text
    assert refusal.text not in others


@pytest.mark.parametrize(("lanes", "kind"), [(1, "serial"), (2, "dual"), (3, "3-lane"), (8, "8-lane")])
def test_kinds_are_named_by_lanes(lanes, kind):
    assert plan_kind(lanes) == kind
    assert Plan(part_tokens=((5,) * lanes,), reason="").kind == kind
    assert Plan(part_tokens=((5,) * lanes,), reason="").num_lanes == lanes


def test_tokens_by_rank_are_those_of_one_lane():
    plan = Plan(part_tokens=((1, 2), (3, 4), (5, 6)), reason="")
    assert plan.rows_by_rank(0) == (1, 3, 5)
    assert plan.rows_by_rank(1) == (2, 4, 6)


def test_a_padded_plan_has_the_same_rows_on_all_ranks_and_lanes():
    plan = Plan(part_tokens=((1, 2), (3, 0), (0, 0)), reason="dual allowed", graph=4)
    assert plan.rows_by_rank(0) == plan.rows_by_rank(1) == (4, 4, 4)
    assert str(plan) == "dual: dual allowed, padded to 4 a lane"
    assert not plan.is_empty
    assert replace(plan, part_tokens=((0, 0),) * 3).is_empty
    with pytest.raises(AssertionError, match=r"\b4\b"):
        plan.unsplit()


@pytest.mark.parametrize(
    ("part_tokens", "is_empty"),
    [(((0,),), True), (((0,), (0,)), True), (((0, 0), (0, 1)), False), (((3,), (0,)), False)],
)
def test_a_plan_is_empty_if_no_rank_has_a_token(part_tokens, is_empty):
    assert Plan(part_tokens=part_tokens, reason="").is_empty is is_empty


def test_a_plan_prints_its_kind_and_its_numbers():
    plan = Plan(part_tokens=((24,),), reason="below the threshold", detail="24 tokens on rank 1, split from 512")
    assert str(plan) == "serial: 24 tokens on rank 1, split from 512"
    assert str(replace(plan, detail="")) == "serial: below the threshold"
