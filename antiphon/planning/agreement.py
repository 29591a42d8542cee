"""The exchange by which all ranks see the same proposals before a step."""

from __future__ import annotations

from dataclasses import replace

import torch

from antiphon.comm.group import RankGroup
from antiphon.core.errors import PeerError
from antiphon.core.plan import ROW_SIZE, Proposal


def exchange(group: RankGroup, proposal: Proposal) -> list[Proposal]:
    """Exchange proposals. Returns those of all ranks, in rank order: the same list on every rank.

    In the debug mode that records collectives, a fingerprint of those issued since the last exchange travels along.

    Raises `PeerError` if a rank does not answer in time, if the ranks run under different policies, or if they issued
    their collectives in a different order.
    """
    if group.size == 1:
        return [proposal]
    proposal = replace(proposal, order=group.order_fingerprint())
    row = torch.tensor(proposal.to_row(), dtype=torch.int64, device="cpu")
    rows = torch.empty(group.size * ROW_SIZE, dtype=torch.int64, device="cpu")
    group.all_gather(rows, row, "agreement").wait()
    proposals = [Proposal.from_row(row) for row in rows.view(group.size, ROW_SIZE).tolist()]
    same_wave = len({p.wave for p in proposals}) == 1
    if same_wave and len({p.policy for p in proposals}) > 1:
        raise PeerError(
            "the ranks run with different options",
            limit=f"their fingerprints are {[p.policy for p in proposals]}",
            remedy="start every rank with the same options",
        )
    if len({p.order for p in proposals}) > 1:
        raise PeerError("the ranks issued different collectives", limit=group.first_order_difference())
    group.clear_order()
    return proposals
