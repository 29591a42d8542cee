"""What one rank proposes for its batch."""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.core.batch import Batch
from antiphon.core.plan import Plan, Proposal
from antiphon.core.policy import OverlapPolicy
from antiphon.planning.decision import decide
from antiphon.splitting import find_cut


class Planner:
    """Proposes by the policy's cut rule and decides by its thresholds. The policy changes only between runs."""

    def __init__(self, policy: OverlapPolicy) -> None:
        self.policy = policy

    def propose(self, batch: Batch, *, wave: int = 0, order: int = 0) -> Proposal:
        """This rank's offer; `wave` and `order` as in `Proposal`."""
        decode_only = batch.decode_only
        cut = find_cut(
            batch.query_lens,
            num_parts=1 if self.policy.dbo == "off" else self.policy.micro_batches,
            rule=self.policy.split,
            decode_only=decode_only,
            imbalance_ratio=self.policy.imbalance_ratio,
        )
        return Proposal(
            num_tokens=batch.num_tokens,
            decode_only=decode_only,
            num_prefill_tokens=batch.num_prefill_tokens,
            part_tokens=cut.part_tokens,
            refusal=cut.refusal,
            wave=wave,
            policy=self.policy.fingerprint(),
            order=order,
        )

    def decide(self, proposals: Sequence[Proposal]) -> Plan:
        return decide(proposals, self.policy)
