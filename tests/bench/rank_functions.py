"""Functions that the bench tests run on ranks, and a transport that returns wrong sums."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from antiphon.comm import Flight, RankGroup
from antiphon.comm.local import LocalTransport
from antiphon.core.errors import OptionError


def say(group: RankGroup, device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """Who this is, what it was given, and what the others say."""
    return {
        "rank": group.rank,
        "pid": os.getpid(),
        "device": str(device),
        "options": options,
        "no_peers": os.environ.get("NCCL_P2P_DISABLE"),
        "everybody": group.all_gather_object(group.rank * 10),
    }


def fail_on_one(group: RankGroup, device: torch.device, options: dict[str, Any]) -> None:
    """Rank 1 raises; the others wait for it."""
    if group.rank == 1:
        raise RuntimeError("rank one has had enough")
    time.sleep(60)


def refuse(group: RankGroup, device: torch.device, options: dict[str, Any]) -> None:
    raise OptionError("--colour 'mauve' is not known", remedy="use red", option="colour", value="mauve")


def die(group: RankGroup, device: torch.device, options: dict[str, Any]) -> None:
    if group.rank == 0:
        os.kill(os.getpid(), 9)
    time.sleep(60)


def sleep(group: RankGroup, device: torch.device, options: dict[str, Any]) -> None:
    time.sleep(60)


def return_something_else(group: RankGroup, device: torch.device, options: dict[str, Any]) -> object:
    return object()


class ForgetsOneToken(LocalTransport):
    """The second lane brings home zeros for its first token."""

    name = "forgets-one-token"

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        if lane == 1:
            partial_RD[:1] = 0
        return super().send_partials(lane, partial_RD, label)
