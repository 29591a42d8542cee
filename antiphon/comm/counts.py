"""The exchange of token counts that precedes a dispatch where the caller does not know them. The host waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from antiphon.comm.group import Collective, RankGroup
from antiphon.core.errors import LaneError
from antiphon.runtime import Pending


def wait_for_counts(work: Collective, label: str) -> None:
    """Wait for an exchange of counts inside a dispatch, and record it as exposed communication.

    It is a pending with no messages, because the messages of the counts are added to those of the rows.
    """
    Pending(work.wait, label=label, ready_ns=work.ready_ns, num_messages=0).wait()


def exchange_counts(group: RankGroup, num_tokens: int, *, lane: int, label: str) -> tuple[int, ...]:
    """Exchange the token counts of all ranks, for a caller that does not know them. The host waits.

    Raises `LaneError` if a rank is on another lane: counts are matched by their order across lanes.
    """
    found_W2 = torch.empty(group.size, 2, dtype=torch.int64, device="cpu")
    label = f"counts of {label}"
    work = group.all_gather(found_W2, torch.tensor([[num_tokens, lane]], device="cpu"), label)
    wait_for_counts(work, label)
    counts, lanes = found_W2.T.tolist()
    check_lanes(lanes, lane, label)
    return tuple(counts)


def check_lanes(lane_by_rank: Sequence[int], lane: int, label: str) -> None:
    """Raise `LaneError` if a rank is on a different lane."""
    for rank, other in enumerate(lane_by_rank):
        if other != lane:
            raise LaneError(
                f"{label} on lane {lane} met rank {rank} on lane {other}",
                limit="all ranks must call dispatch and combine in the same order over all lanes",
                remedy="let the lanes switch alike on all ranks",
            )
