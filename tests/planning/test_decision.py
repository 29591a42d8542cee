"""The decision: a pure function of all ranks' proposals, paced by the busiest rank of each lane."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from antiphon.core.plan import MAX_LANES, EagerReason, Plan, Proposal, SerialReason
from antiphon.core.policy import DBO_MODES, NEVER, OverlapPolicy
from antiphon.planning import decide

ON, OFF, AUTO = (OverlapPolicy(dbo=mode) for mode in ("on", "off", "auto"))


def offer(*part_tokens: int, decode_only: bool = False, wave: int = 0) -> Proposal:
    return Proposal(num_tokens=sum(part_tokens), decode_only=decode_only, part_tokens=part_tokens, wave=wave)


def refused(
    num_tokens: int, refusal: SerialReason = SerialReason.NO_BOUNDARY, *, decode_only: bool = False
) -> Proposal:
    return Proposal(num_tokens=num_tokens, decode_only=decode_only, part_tokens=(num_tokens,), refusal=refusal)


IDLE = refused(0, SerialReason.TOO_FEW_TOKENS)


@st.composite
def offers(draw, num_lanes: int):
    if draw(st.booleans()):
        return refused(
            draw(st.integers(0, 700)), draw(st.sampled_from([SerialReason.TOO_FEW_TOKENS, SerialReason.NO_BOUNDARY]))
        )
    parts = draw(st.lists(st.integers(1, 500), min_size=num_lanes, max_size=num_lanes))
    num_prefill = draw(st.integers(0, sum(parts)))
    return replace(offer(*parts, decode_only=num_prefill == 0), num_prefill_tokens=num_prefill)


@st.composite
def policies(draw, micro_batches: int):
    thresholds = st.none() | st.integers(0, 800)
    return OverlapPolicy(
        dbo=draw(st.sampled_from(DBO_MODES)),
        micro_batches=micro_batches,
        prefill_threshold=draw(thresholds),
        decode_threshold=draw(thresholds),
        min_total_tokens=draw(st.integers(0, 300)),
        min_prefill_tokens=draw(st.integers(0, 300)),
    )


@st.composite
def decisions(draw):
    num_lanes = draw(st.integers(2, MAX_LANES))
    return draw(st.lists(offers(num_lanes), min_size=1, max_size=6)), draw(policies(num_lanes))


def check_tokens(plan: Plan, proposals: list[Proposal]) -> None:
    assert len(plan.part_tokens) == len(proposals)
    for parts, proposal in zip(plan.part_tokens, proposals, strict=True):
        assert len(parts) == plan.num_lanes
        assert sum(parts) == proposal.num_tokens
        assert min(parts) >= 0


@settings(deadline=None)
@given(decisions())
def test_plans_keep_every_token_of_every_rank(case):
    proposals, policy = case
    check_tokens(decide(proposals, policy), proposals)


@settings(deadline=None)
@given(decisions())
def test_no_lane_is_empty_on_all_ranks(case):
    proposals, policy = case
    plan = decide(proposals, policy)
    if plan.num_lanes > 1:
        assert all(any(plan.rows_by_rank(lane)) for lane in range(plan.num_lanes))


@settings(deadline=None)
@given(decisions())
def test_the_decision_is_pure_and_the_same_from_the_rows(case):
    proposals, policy = case
    before = repr(proposals)
    plan = decide(proposals, policy)
    assert repr(proposals) == before
    assert decide(tuple(proposals), policy) == plan
    assert decide([Proposal.from_row(proposal.to_row()) for proposal in proposals], policy) == plan


@settings(deadline=None)
@given(decisions(), st.randoms(use_true_random=False))
def test_the_order_of_the_ranks_does_not_matter(case, chance):
    proposals, policy = case
    tokens = [proposal.num_tokens for proposal in proposals]
    assume(tokens.count(max(tokens)) == 1)
    order = list(range(len(proposals)))
    chance.shuffle(order)
    plan = decide(proposals, policy)
    shuffled = decide([proposals[rank] for rank in order], policy)
    assert shuffled.part_tokens == tuple(plan.part_tokens[rank] for rank in order)
    assert (shuffled.reason, shuffled.idle) == (plan.reason, plan.idle)


@settings(deadline=None)
@given(decisions())
def test_the_busiest_rank_decides_unless_lanes_are_uneven(case):
    proposals, policy = case
    tokens = [proposal.num_tokens for proposal in proposals]
    assume(any(tokens))
    busiest = proposals[tokens.index(max(tokens))]
    allowed = (
        policy.dbo != "off"
        and len(busiest.part_tokens) > 1
        and busiest.num_tokens >= policy.threshold(decode_only=busiest.decode_only)
        and busiest.num_tokens >= policy.min_total_tokens
        and not 0 < busiest.num_prefill_tokens < policy.min_prefill_tokens
    )
    plan = decide(proposals, policy)
    if plan.num_lanes > 1:
        assert allowed
        assert lane_tokens(plan) - max(tokens) <= max(plan.num_lanes, 2 * policy.imbalance_ratio * max(tokens))
    else:
        assert (plan.reason == "lanes are uneven across ranks") is allowed


def lane_tokens(plan: Plan) -> int:
    """The tokens of the busiest rank of each lane, summed: what a split step computes, one lane after another."""
    return sum(max(plan.rows_by_rank(lane)) for lane in range(plan.num_lanes))


def test_off_is_serial_with_its_reason():
    plan = decide([offer(500, 500), offer(400, 400)], OFF)
    assert plan.part_tokens == ((1000,), (800,))
    assert (plan.kind, plan.reason, plan.idle) == ("serial", "dbo is off", False)


@pytest.mark.parametrize(
    ("policy", "tokens", "decode_only", "kind"),
    [
        (AUTO, 510, False, "serial"),
        (AUTO, 512, False, "dual"),
        (AUTO, 30, True, "serial"),
        (AUTO, 32, True, "dual"),
        (ON, 2, False, "dual"),
        (ON, 2, True, "dual"),
        (replace(ON, prefill_threshold=100), 98, False, "serial"),
        (replace(ON, prefill_threshold=100), 100, False, "dual"),
        (replace(ON, prefill_threshold=100), 2, True, "dual"),
        (replace(ON, decode_threshold=8), 6, True, "serial"),
        (replace(ON, decode_threshold=8), 8, True, "dual"),
        (replace(ON, decode_threshold=8), 6, False, "dual"),
        (replace(AUTO, prefill_threshold=4), 4, False, "dual"),
        (replace(AUTO, decode_threshold=1000), 998, True, "serial"),
    ],
)
def test_thresholds(policy, tokens, decode_only, kind):
    assert decide([offer(tokens // 2, tokens // 2, decode_only=decode_only)], policy).kind == kind


@pytest.mark.parametrize(
    ("options", "tokens", "num_prefill", "reason"),
    [
        ({"min_total_tokens": 256}, 254, 254, "below min_total_tokens_to_split"),
        ({"min_total_tokens": 256}, 254, 0, "below min_total_tokens_to_split"),
        ({"min_total_tokens": 256}, 256, 256, "dual allowed"),
        ({"min_prefill_tokens": 64}, 400, 63, "below min_prefill_tokens_to_split"),
        ({"min_prefill_tokens": 64}, 400, 64, "dual allowed"),
        ({"min_prefill_tokens": 64}, 400, 0, "dual allowed"),  # only decode: there is no prefill to be too small
        ({"min_total_tokens": 256, "min_prefill_tokens": 64}, 100, 10, "below min_total_tokens_to_split"),
        ({"min_total_tokens": 10, "prefill_threshold": 500}, 400, 400, "below the prefill threshold"),
    ],
)
def test_the_smallest_step_to_split(options, tokens, num_prefill, reason):
    busiest = replace(offer(tokens // 2, tokens // 2, decode_only=num_prefill == 0), num_prefill_tokens=num_prefill)
    other = replace(offer(10, 10), num_prefill_tokens=20)
    for proposals in ([busiest, other], [other, busiest]):
        plan = decide(proposals, replace(ON, **options))
        assert plan.reason == reason
        assert (plan.num_lanes > 1) is (reason == "dual allowed")


def test_below_the_smallest_step_the_plan_says_how_far():
    small = replace(offer(100, 100), num_prefill_tokens=50)
    plan = decide([small], replace(ON, min_total_tokens=256))
    assert str(plan) == "serial: 200 tokens on rank 0, a step is split from 256"
    plan = decide([small], replace(ON, min_prefill_tokens=64))
    assert str(plan) == (
        "serial: 50 of prompts among 200 tokens on rank 0, with prompts a step is split from 64 of them"
    )
    assert str(decide([small], replace(ON, min_total_tokens=128))) == "dual: 200 tokens on rank 0, split from 128"


def test_the_threshold_counts_tokens_of_the_busiest_rank_and_not_of_all():
    assert decide([offer(200, 200)] * 4, AUTO).kind == "serial"
    assert decide([offer(200, 200)] * 3 + [offer(256, 256)], AUTO).kind == "dual"


def test_the_kind_of_the_busiest_rank_chooses_the_threshold():
    decoding, prefilling = offer(20, 20, decode_only=True), offer(50, 50)
    assert decide([decoding, prefilling], AUTO).kind == "serial"
    assert decide([decoding, replace(prefilling, num_tokens=30, part_tokens=(15, 15))], AUTO).kind == "dual"


def test_below_a_threshold_the_plan_says_who_and_how_far():
    plan = decide([offer(5, 5), offer(12, 12)], AUTO)
    assert plan.reason == "below the prefill threshold"
    assert str(plan) == "serial: 24 tokens on rank 1, prefill is split from 512"
    assert decide([offer(5, 5, decode_only=True)], AUTO).reason == "below the decode threshold"


@pytest.mark.parametrize("small", [IDLE, refused(1, SerialReason.TOO_FEW_TOKENS), refused(400)])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_idle_or_small_rank_runs_its_batch_whole_in_lane_0_beside_dummies(small, rank):
    proposals = [offer(300, 300)]
    proposals.insert(rank, small)
    plan = decide(proposals, AUTO)
    assert plan.kind == "dual"
    assert plan.part_tokens[rank] == (small.num_tokens, 0)
    assert plan.part_tokens[1 - rank] == (300, 300)


def test_an_idle_rank_has_a_dummy_for_every_lane():
    plan = decide([IDLE, offer(10, 10, 10, 10)], replace(ON, micro_batches=4))
    assert plan.part_tokens == ((0, 0, 0, 0), (10, 10, 10, 10))
    assert plan.kind == "4-lane"


def test_a_small_rank_that_can_be_cut_is_cut():
    assert decide([offer(1, 1), offer(300, 212)], AUTO).part_tokens == ((1, 1), (300, 212))


@pytest.mark.parametrize("refusal", [SerialReason.NO_BOUNDARY, SerialReason.TOO_FEW_TOKENS])
def test_a_busiest_rank_that_cannot_be_cut_makes_the_step_serial(refusal):
    plan = decide([offer(5, 5), offer(8, 8), refused(77, refusal)], ON)
    assert plan.part_tokens == ((10,), (16,), (77,))
    assert plan.reason == refusal.text
    for word in ("serial", refusal.text, "77 tokens", "rank 2"):
        assert word in str(plan)


def test_a_dual_plan_says_who_decided_and_from_when():
    plan = decide([offer(5, 5), offer(300, 212)], AUTO)
    assert plan.reason == "dual allowed"
    assert str(plan) == "dual: 512 tokens on rank 1, split from 512"
    assert str(decide([offer(5, 5)], ON)) == "dual: 10 tokens on rank 0, split from 2"


@pytest.mark.parametrize("policy", [ON, OFF, AUTO])
@pytest.mark.parametrize(("waves", "idle"), [((3, 3, 3), True), ((3, 3, 4), False), ((0,), True), ((1, 0), False)])
def test_without_work_the_group_is_idle_only_if_all_have_seen_the_same_messages(policy, waves, idle):
    plan = decide([replace(IDLE, wave=wave) for wave in waves], policy)
    reason = "no work" if idle else "a message is under way"
    assert (plan.idle, plan.kind, plan.reason, plan.is_empty) == (idle, "serial", reason, True)


@pytest.mark.parametrize("policy", [ON, OFF, AUTO])
def test_work_waits_until_all_ranks_have_seen_the_same_messages(policy):
    plan = decide([offer(300, 300, wave=2), offer(300, 300, wave=1)], policy)
    assert (plan.idle, plan.reason, plan.is_empty) == (False, "a message is under way", True)
    assert not decide([offer(300, 300, wave=2), offer(300, 300, wave=2)], policy).is_empty


@pytest.mark.parametrize("policy", [ON, OFF, AUTO])
def test_with_work_the_group_is_never_idle(policy):
    plan = decide([offer(300, 300, wave=1), replace(IDLE, wave=1)], policy)
    assert not plan.idle
    assert not plan.is_empty


def test_of_equally_busy_ranks_the_first_decides():
    few = replace(offer(300, 300), num_prefill_tokens=10)
    many = replace(offer(300, 300), num_prefill_tokens=600)
    policy = replace(ON, min_prefill_tokens=100)
    assert decide([many, few], policy).kind == "dual"
    assert decide([few, many], policy).kind == "serial"
    assert decide([refused(600), offer(300, 300)], AUTO).reason == SerialReason.NO_BOUNDARY.text


@pytest.mark.parametrize("policy", [ON, AUTO])
@pytest.mark.parametrize("order", [1, -1])
def test_lanes_that_are_longer_than_the_serial_step_are_not_run(policy, order):
    """(4096, 4096) beside (8000, 0): every lane waits for the rank with the most tokens in it."""
    plan = decide([offer(4096, 4096), refused(8000)][::order], policy)
    assert plan.part_tokens == ((8192,), (8000,))[::order]
    assert plan.reason == "lanes are uneven across ranks"
    rank = 0 if order == 1 else 1
    assert str(plan) == (
        f"serial: 12096 tokens in lanes of 8000 and 4096, one after another, against 8192 tokens on rank {rank} "
        "in a serial step"
    )


@pytest.mark.parametrize(
    ("whole", "ratio", "kind"),
    [
        (4096, 0.0, "dual"),
        (4098, 0.0, "dual"),  # two lanes, two tokens: rounding
        (4099, 0.0, "serial"),
        (5734, 0.1, "dual"),  # 1,638 more than 4,096: a fifth of 8,192
        (5735, 0.1, "serial"),
        (8000, 0.24, "dual"),
        (8000, 0.23, "serial"),
    ],
)
def test_lanes_may_be_longer_by_twice_the_imbalance_ratio(whole, ratio, kind):
    assert decide([offer(4096, 4096), refused(whole)], replace(ON, imbalance_ratio=ratio)).kind == kind


@pytest.mark.parametrize(("parts", "place"), [((300, 212), (250, 0)), ((212, 300), (0, 250)), ((256, 256), (250, 0))])
def test_what_cannot_be_cut_runs_whole_in_the_longest_lane(parts, place):
    plan = decide([refused(250), offer(*parts), IDLE], ON)
    assert plan.part_tokens == (place, parts, (0, 0))


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=2, max_size=MAX_LANES), st.data())
def test_idle_and_small_ranks_never_switch_overlap_off(parts, data):
    """The batch of a small rank fits into the longest lane whole."""
    busiest = offer(*parts)
    others = data.draw(st.lists(st.integers(0, max(parts)).map(refused), max_size=5))
    place = data.draw(st.integers(0, len(others)))
    policy = replace(ON, micro_batches=len(parts), imbalance_ratio=data.draw(st.floats(0, 1)))
    plan = decide([*others[:place], busiest, *others[place:]], policy)
    assert plan.part_tokens[place] == tuple(parts)
    assert lane_tokens(plan) == sum(parts)


def test_a_kind_of_step_that_is_never_split_is_said_to_be_so():
    policy = replace(AUTO, prefill_threshold=100, decode_threshold=NEVER)
    assert decide([offer(50, 50)], policy).kind == "dual"
    plan = decide([offer(5000, 5000, decode_only=True)], policy)
    assert (plan.kind, plan.reason) == ("serial", "decode is not split")
    assert str(plan) == "serial: 10000 tokens on rank 0, decode is not split"
    plan = decide([offer(5000, 5000)], replace(AUTO, prefill_threshold=NEVER, decode_threshold=100))
    assert str(plan) == "serial: 10000 tokens on rank 0, prefill is not split"


@settings(deadline=None)
@given(decisions())
def test_the_plan_prints_the_numbers_of_the_rank_that_decided(case):
    proposals, policy = case
    tokens = [proposal.num_tokens for proposal in proposals]
    assume(any(tokens) and policy.dbo != "off")
    text = str(decide(proposals, policy))
    assert f"{max(tokens)} tokens on rank {tokens.index(max(tokens))}" in text


# ---- padded sizes


def _tokens(*counts: int, prefill: int = 0) -> list[Proposal]:
    return [Proposal(num_tokens=n, decode_only=n > 0, part_tokens=(n,), num_prefill_tokens=prefill) for n in counts]


@pytest.mark.parametrize(
    ("counts", "size"), [((1, 1), 1), ((3, 1), 4), ((0, 5), 8), ((8, 8), 8), ((9, 0), 0), ((0, 0), 0)]
)
def test_a_step_is_padded_to_the_smallest_size_that_holds_every_rank(counts: tuple[int, ...], size: int) -> None:
    plan = decide(_tokens(*counts), OverlapPolicy(dbo="off"), {1: (1, 2, 4, 8), 2: (16,)})
    assert plan.graph == size
    assert plan.part_tokens == tuple((count,) for count in counts)
    assert plan.rows_by_rank(0) == (tuple(counts) if not size else (size,) * len(counts))
    assert plan.eager is (EagerReason.TOO_LARGE if counts == (9, 0) else EagerReason.NONE)


def test_prefill_is_not_padded_and_nothing_is_without_a_ladder() -> None:
    ladders = {1: (4, 8)}
    for proposals, known, reason in (
        (_tokens(3, 3), ladders, EagerReason.NONE),
        (_tokens(3, 3, prefill=2), ladders, EagerReason.PROMPTS),
        (_tokens(3, 9), ladders, EagerReason.TOO_LARGE),
        (_tokens(3, 3), {2: (4, 8)}, EagerReason.NO_SIZES),
        (_tokens(3, 3), {}, EagerReason.NO_SIZES),
        (_tokens(0, 0), ladders, EagerReason.NONE),  # it does not run
    ):
        plan = decide(proposals, OverlapPolicy(dbo="off"), known)
        assert plan.eager is reason
        assert bool(plan.graph) == (reason is EagerReason.NONE and not plan.is_empty)


def test_each_lane_is_padded_to_the_longest_part_of_all_ranks() -> None:
    offers = [Proposal(num_tokens=n, decode_only=True, part_tokens=(n // 2, n - n // 2)) for n in (7, 2)]
    plan = decide(offers, OverlapPolicy(dbo="on"), {1: (16,), 2: (2, 4, 8)})
    assert (plan.num_lanes, plan.graph) == (2, 4)
    assert "4" in str(plan)
