"""The decision: a pure function from all ranks' proposals to one plan.

The rank with the most tokens sets the pace of a serial step, so its size decides whether to split. A smaller rank cuts
its batch, or runs it whole in one lane and dummies in the others.

In a split step, every lane waits for the rank with the most tokens in it. The pace is the sum of these longest parts:

             lane 0   lane 1
    rank 0    4,096    4,096
    rank 1    8,000        0        12,096 one after another, and 8,192 in a serial step: not split

An idle rank, or one whose batch fits into a lane, adds nothing and never switches overlap off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from antiphon.core.plan import EagerReason, Plan, Proposal, plan_kind
from antiphon.core.policy import NEVER, OverlapPolicy
from antiphon.planning.measured import MeasuredDecode

NO_LADDERS: Mapping[int, Sequence[int]] = MappingProxyType({})


def decide(
    proposals: Sequence[Proposal],
    policy: OverlapPolicy,
    ladders: Mapping[int, Sequence[int]] = NO_LADDERS,
    measured: MeasuredDecode | None = None,
) -> Plan:
    """The plan for the step that the ranks propose. proposals: in rank order; equal ones give an equal plan.

    While a message has reached only some ranks, the plan is empty, so that it takes effect at the same step on all.
    ladders: by number of lanes, ascending sizes of a lane to which steps without prefill are padded.
    measured: decides about steps without prefill under `auto`, unless the user has set a threshold for them.
    """
    if not policy.measures_decode:
        measured = None
    plan = _split_or_serial(proposals, policy, measured)
    if plan.is_empty:
        return plan
    if any(proposal.num_prefill_tokens for proposal in proposals):
        return replace(plan, eager=EagerReason.PROMPTS)
    ladder = ladders.get(plan.num_lanes, ())
    longest = max(max(parts) for parts in plan.part_tokens)
    size = next((size for size in ladder if size >= longest), 0)
    if not size:
        return replace(plan, eager=EagerReason.TOO_LARGE if ladder else EagerReason.NO_SIZES)
    return replace(plan, graph=size)


def _split_or_serial(proposals: Sequence[Proposal], policy: OverlapPolicy, measured: MeasuredDecode | None) -> Plan:
    if len({proposal.wave for proposal in proposals}) > 1:
        return Plan(part_tokens=((0,),) * len(proposals), reason="a message is under way")
    if not any(proposal.num_tokens for proposal in proposals):
        return _serial(proposals, "no work", idle=True)
    if policy.dbo == "off":
        return _serial(proposals, "dbo is off")
    rank = max(range(len(proposals)), key=lambda r: (proposals[r].num_tokens, -r))
    busiest = proposals[rank]
    if any(proposal.num_prefill_tokens for proposal in proposals):
        measured = None
    if too_small := _too_small(busiest, rank, policy, measured):
        return _serial(proposals, *too_small)
    if not busiest.can_split:
        refusal = busiest.refusal.text
        return _serial(proposals, refusal, f"{refusal} ({busiest.num_tokens} tokens on rank {rank})")
    num_lanes = len(busiest.part_tokens)
    parts = _parts(proposals, num_lanes)
    if too_long := _too_long(parts, busiest, rank, policy):
        return _serial(proposals, *too_long)
    if measured is not None:
        reason = f"{plan_kind(num_lanes)} measured faster"
        return Plan(part_tokens=parts, reason=reason, detail=_as_measured(busiest, rank, measured))
    threshold = policy.threshold(decode_only=busiest.decode_only)
    smallest = max(threshold, policy.min_total_tokens, num_lanes)
    return Plan(
        part_tokens=parts,
        reason=f"{plan_kind(num_lanes)} allowed",
        detail=f"{busiest.num_tokens} tokens on rank {rank}, split from {smallest}",
    )


def _as_measured(busiest: Proposal, rank: int, measured: MeasuredDecode) -> str:
    size = measured.nearest(busiest.num_tokens)
    return (
        f"{busiest.num_tokens} sequences on rank {rank}; with {size.num_sequences}, a step takes "
        f"{size.split_ms:.2f} ms split and {size.serial_ms:.2f} ms serial"
    )


def _parts(proposals: Sequence[Proposal], num_lanes: int) -> tuple[tuple[int, ...], ...]:
    """The tokens of every lane on every rank. A batch that cannot be cut runs in the longest lane, where it adds least.

    Of equally long lanes it is the first, so that all ranks choose the same one.
    """
    cut = [proposal.part_tokens for proposal in proposals if proposal.can_split]
    longest = [max(parts) for parts in zip(*cut, strict=True)]
    lane = longest.index(max(longest))
    return tuple(
        proposal.part_tokens
        if proposal.can_split
        else tuple(proposal.num_tokens if other == lane else 0 for other in range(num_lanes))
        for proposal in proposals
    )


def _too_long(
    parts: Sequence[Sequence[int]], busiest: Proposal, rank: int, policy: OverlapPolicy
) -> tuple[str, str] | None:
    """Reason and numbers if the lanes, one after another, are so much longer than the serial step that splitting loses.

    Two ranks that are cut `imbalance_ratio` off the middle, on opposite sides, make the lanes longer by twice that
    share. The cut rule allows this, so it is not refused. Neither is rounding, of at most one token per lane.
    """
    lanes = [max(tokens) for tokens in zip(*parts, strict=True)]
    serial = busiest.num_tokens
    if sum(lanes) - serial <= max(len(lanes), 2 * policy.imbalance_ratio * serial):
        return None
    return (
        "lanes are uneven across ranks",
        f"{sum(lanes)} tokens in lanes of {' and '.join(map(str, lanes))}, one after another, against {serial} tokens "
        f"on rank {rank} in a serial step",
    )


def _too_small(
    busiest: Proposal, rank: int, policy: OverlapPolicy, measured: MeasuredDecode | None
) -> tuple[str, str] | None:
    """Reason and numbers if the step is too small to be split: for the two absolute minimums, or for its threshold.

    measured: replaces the threshold.
    """
    size = f"{busiest.num_tokens} tokens on rank {rank}"
    if busiest.num_tokens < policy.min_total_tokens:
        return (
            "below min_total_tokens_to_split",
            f"{size}, a step is split from {policy.min_total_tokens}",
        )
    if 0 < busiest.num_prefill_tokens < policy.min_prefill_tokens:
        return (
            "below min_prefill_tokens_to_split",
            f"{busiest.num_prefill_tokens} of prompts among {size}, with prompts a step is split "
            f"from {policy.min_prefill_tokens} of them",
        )
    if measured is not None:
        if measured.splits(busiest.num_tokens):
            return None
        return "serial measured faster", _as_measured(busiest, rank, measured)
    kind, threshold = "decode" if busiest.decode_only else "prefill", policy.threshold(decode_only=busiest.decode_only)
    if busiest.num_tokens >= threshold:
        return None
    if threshold >= NEVER:
        return f"{kind} is not split", f"{size}, {kind} is not split"
    return f"below the {kind} threshold", f"{size}, {kind} is split from {threshold}"


def _serial(proposals: Sequence[Proposal], reason: str, detail: str = "", *, idle: bool = False) -> Plan:
    return Plan(
        part_tokens=tuple((proposal.num_tokens,) for proposal in proposals), reason=reason, detail=detail, idle=idle
    )
