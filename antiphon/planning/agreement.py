"""The exchange by which all ranks see the same proposals before a step."""

from __future__ import annotations

from dataclasses import replace

import torch

from antiphon.comm.group import RankGroup
from antiphon.core.errors import PeerError
from antiphon.core.plan import ROW_SIZE, Proposal


def exchange(group: RankGroup, proposal: Proposal) -> list[Proposal]:
    """Every rank's proposal, in rank order: the same list on every rank.

    Adds the fingerprint of the collectives that this rank has issued since the last exchange, where they are recorded.

    Raises `PeerError` if a rank does not come in time, or if the ranks run under different policies or (in the
    debug mode that records it) issued their collectives in a different order.
    """
    if group.size == 1:
        return [proposal]
    proposal = replace(proposal, order=group.order_fingerprint())
    mine = torch.tensor(proposal.to_row(), dtype=torch.int64, device="cpu")
    rows = torch.empty(group.size * ROW_SIZE, dtype=torch.int64, device="cpu")
    group.all_gather(rows, mine, "agreement").wait()
    proposals = [Proposal.from_row(row) for row in rows.view(group.size, ROW_SIZE).tolist()]
    same_wave = len({p.wave for p in proposals}) == 1
    if same_wave and len({p.policy for p in proposals}) > 1:
        raise PeerError(
            "the ranks decide by different options",
            limit=f"their fingerprints are {[p.policy for p in proposals]}",
            remedy="start every rank with the same options",
        )
    if len({p.order for p in proposals}) > 1:
        raise PeerError("the ranks issued different collectives", limit=group.first_order_difference())
    group.clear_order()
    return proposals
