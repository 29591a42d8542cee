"""The decision: a pure function from all ranks' proposals to one plan.

The rank with the most tokens sets the pace of a step, so it alone decides whether to split. A smaller rank never
switches overlap off: it cuts what it has, or runs it whole in the first lane and a dummy in the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.core.plan import Plan, Proposal, plan_kind
from antiphon.core.policy import OverlapPolicy

__all__ = ["decide"]


def decide(proposals: Sequence[Proposal], policy: OverlapPolicy) -> Plan:
    """The plan for the step that the ranks propose, the same for the same proposals, in order of rank.

    While a message has reached only some ranks the plan is empty, so that it takes effect at the same step on all.
    """
    if len({proposal.wave for proposal in proposals}) > 1:
        return Plan(part_tokens=((0,),) * len(proposals), reason="a message is under way")
    if not any(proposal.num_tokens for proposal in proposals):
        return _serial(proposals, "no work", idle=True)
    if policy.dbo == "off":
        return _serial(proposals, "dbo is off")
    rank = max(range(len(proposals)), key=lambda r: (proposals[r].num_tokens, -r))
    busiest = proposals[rank]
    if too_small := _too_small(busiest, rank, policy):
        return _serial(proposals, *too_small)
    threshold = policy.threshold(decode_only=busiest.decode_only)
    if busiest.num_tokens < threshold:
        kind = "decode" if busiest.decode_only else "prefill"
        return _serial(
            proposals,
            f"below the {kind} threshold",
            f"{busiest.num_tokens} tokens on rank {rank}, {kind} is split from {threshold}",
        )
    if not busiest.can_split:
        return _serial(
            proposals, busiest.refusal.text, f"{busiest.refusal.text} ({busiest.num_tokens} tokens on rank {rank})"
        )
    num_lanes = len(busiest.part_tokens)
    smallest = max(threshold, policy.min_total_tokens, num_lanes)
    return Plan(
        part_tokens=tuple(
            proposal.part_tokens if proposal.can_split else (proposal.num_tokens, *[0] * (num_lanes - 1))
            for proposal in proposals
        ),
        reason=f"{plan_kind(num_lanes)} allowed",
        detail=f"{busiest.num_tokens} tokens on rank {rank}, split from {smallest}",
    )


def _too_small(busiest: Proposal, rank: int, policy: OverlapPolicy) -> tuple[str, str] | None:
    """Reason and numbers, if the step is smaller than the smallest that may be split, whatever the thresholds say."""
    if busiest.num_tokens < policy.min_total_tokens:
        return (
            "below min_total_tokens_to_split",
            f"{busiest.num_tokens} tokens on rank {rank}, a step is split from {policy.min_total_tokens}",
        )
    if 0 < busiest.num_prefill_tokens < policy.min_prefill_tokens:
        return (
            "below min_prefill_tokens_to_split",
            f"{busiest.num_prefill_tokens} of prompts among {busiest.num_tokens} tokens on rank {rank}, with prompts a "
            f"step is split from {policy.min_prefill_tokens} of them",
        )
    return None


def _serial(proposals: Sequence[Proposal], reason: str, detail: str = "", *, idle: bool = False) -> Plan:
    return Plan(
        part_tokens=tuple((proposal.num_tokens,) for proposal in proposals), reason=reason, detail=detail, idle=idle
    )
