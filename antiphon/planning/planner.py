"""One rank's side of agreeing on the plan of a step."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

from antiphon.comm.group import RankGroup
from antiphon.core.batch import Batch
from antiphon.core.plan import Plan, Proposal
from antiphon.core.policy import OverlapPolicy
from antiphon.planning.agreement import exchange
from antiphon.planning.decision import decide
from antiphon.splitting import find_cut


class Planner:
    """Proposes by the policy's cut rule, and decides by its thresholds. The policy changes only between runs.

    ladder: as in `decide`, the same on all ranks. If only some layers are split, no step is padded.
    """

    def __init__(self, policy: OverlapPolicy, ladder: Sequence[int] = ()) -> None:
        self.ladder = tuple(ladder)
        self.policy = policy

    def agree(self, batch: Batch, group: RankGroup, *, wave: int = 0) -> Plan:
        """Agree on the plan of the next step. All ranks must call this together. Raises as `exchange` does."""
        ladder = self.ladder if self.policy.splits_all_layers else ()
        return decide(exchange(group, self.propose(batch, wave=wave)), self.policy, ladder)

    def propose(self, batch: Batch, *, wave: int = 0) -> Proposal:
        """This rank's proposal for its batch. wave: as in `Proposal`."""
        decode_only = batch.decode_only
        whole = Proposal(
            num_tokens=batch.num_tokens,
            decode_only=decode_only,
            num_prefill_tokens=batch.num_prefill_tokens,
            part_tokens=(batch.num_tokens,),
            wave=wave,
            policy=zlib.crc32(repr((self.policy.fingerprint(), self.ladder)).encode()),
        )
        if self.policy.dbo == "off":
            return whole
        cut = find_cut(
            batch.query_lens,
            num_parts=self.policy.micro_batches,
            rule=self.policy.split,
            decode_only=decode_only,
            imbalance_ratio=self.policy.imbalance_ratio,
        )
        return replace(whole, part_tokens=cut.part_tokens, refusal=cut.refusal)
