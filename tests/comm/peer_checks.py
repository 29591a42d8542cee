"""The errors that a rank gets when its peer is missing. Runs on two ranks, of which rank 1 misbehaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from antiphon.comm import ProgressBoard, RankGroup
from antiphon.core.errors import PeerError
from antiphon.core.plan import Proposal
from antiphon.planning import exchange
from tests.support.ranks import Meeting

__all__ = ["Failure", "misbehave"]

_LIMIT_S = 2.0
_ABSENCE_S = 4.0


@dataclass(frozen=True, slots=True)
class Failure:
    """The error that rank 0 got, and after how long. For rank 1, only its process id."""

    message: str
    after_s: float
    pid: int


def misbehave(meeting: Meeting) -> dict[str, Failure]:
    """Rank 1 is late for a collective, is late for the agreement, ends, and never connects, in this order."""
    return {
        "silent": _with_peer(meeting, "silent", _gather, wait_s=_ABSENCE_S),
        "silent agreement": _with_peer(meeting, "agreement", _agree, wait_s=_ABSENCE_S),
        "ended": _with_peer(meeting, "ended", _gather, timeout_s=30.0, wait_s=0.2),
        "absent": _stay_away(meeting),
    }


def _stay_away(meeting: Meeting) -> Failure:
    board = ProgressBoard(meeting.folder / "board-absent", size=meeting.size)
    if meeting.rank == 1:
        return Failure("", 0.0, os.getpid())
    return _failure(
        lambda: RankGroup.connect(
            rank=0, size=2, init_method=meeting.init_method("absent"), timeout_s=_LIMIT_S, board=board
        )
    )


def _with_peer(
    meeting: Meeting,
    name: str,
    communicate: Callable[[RankGroup], object],
    *,
    wait_s: float,
    timeout_s: float = _LIMIT_S,
) -> Failure:
    """Both connect. Rank 0 communicates; rank 1 waits and leaves (for "ended", by ending its process)."""
    board = ProgressBoard(meeting.folder / f"board-{name}", size=meeting.size)
    group = RankGroup.connect(
        rank=meeting.rank,
        size=meeting.size,
        init_method=meeting.init_method(name),
        timeout_s=30.0,
        board=board,
    )
    group.timeout_s = timeout_s
    if meeting.rank == 0:
        failure = _failure(lambda: communicate(group))
        group.close()
        return failure
    board.mark(1, "thinking")
    time.sleep(wait_s)
    if name != "ended":
        group.close()
    return Failure("", 0.0, os.getpid())


def _failure(call: Callable[[], object]) -> Failure:
    start = time.monotonic()
    try:
        call()
    except PeerError as error:
        return Failure(str(error), time.monotonic() - start, os.getpid())
    raise AssertionError("no PeerError")


def _gather(group: RankGroup) -> None:
    group.all_gather(torch.empty(2), torch.zeros(1), "dispatch layer 3").wait()


def _agree(group: RankGroup) -> None:
    exchange(group, Proposal(num_tokens=1, decode_only=False, part_tokens=(1,)))
