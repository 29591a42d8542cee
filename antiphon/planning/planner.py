"""One rank's side of agreeing on the plan of a step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from antiphon.comm.group import RankGroup
from antiphon.core.batch import Batch
from antiphon.core.plan import Plan, Proposal
from antiphon.core.policy import OverlapPolicy
from antiphon.planning.agreement import exchange
from antiphon.planning.decision import NO_LADDERS, decide
from antiphon.planning.measured import MeasuredDecode
from antiphon.splitting import find_cut


class Planner:
    """Proposes by the policy's cut rule, and decides by its thresholds. The policy changes only between runs.

    ladders, measured: as in `decide`, the same on all ranks. If only some layers are split, no split step is padded.
    """

    def __init__(
        self,
        policy: OverlapPolicy,
        ladders: Mapping[int, Sequence[int]] = NO_LADDERS,
        measured: MeasuredDecode | None = None,
    ) -> None:
        self.ladders = ladders
        self.measured = measured
        self.policy = policy
        self._known_fingerprint: tuple[OverlapPolicy | None, int] = (None, 0)

    def agree(self, batch: Batch, group: RankGroup, *, wave: int = 0) -> Plan:
        """Agree on the plan of the next step. All ranks must call this together. Raises as `exchange` does."""
        return decide(exchange(group, self.propose(batch, wave=wave)), self.policy, self._ladders(), self.measured)

    def propose(self, batch: Batch, *, wave: int = 0) -> Proposal:
        """This rank's proposal for its batch. wave: as in `Proposal`."""
        decode_only = batch.decode_only
        whole = Proposal(
            num_tokens=batch.num_tokens,
            decode_only=decode_only,
            num_prefill_tokens=batch.num_prefill_tokens,
            part_tokens=(batch.num_tokens,),
            wave=wave,
            policy=self._fingerprint(),
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

    def _fingerprint(self) -> int:
        """Equal for planners made alike. Computed anew only for another policy, because it is sent in every step."""
        policy, fingerprint = self._known_fingerprint
        if policy is not self.policy:
            told = repr((self.policy.fingerprint(), sorted(self.ladders.items()), self.measured))
            fingerprint = zlib.crc32(told.encode())
            self._known_fingerprint = (self.policy, fingerprint)
        return fingerprint

    def _ladders(self) -> Mapping[int, Sequence[int]]:
        if self.policy.splits_all_layers:
            return self.ladders
        return {lanes: ladder for lanes, ladder in self.ladders.items() if lanes == 1}
