"""Captures without a GPU: `generic:cpu` pretends to capture, and a replay runs the captured function again.

A capture runs nothing. A real graph repeats launches with the addresses of the capture. So does this, because
everything that a captured step reads lies at fixed addresses; what the host decides inside the function is decided
anew, which a graph would not do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from antiphon.comm import RankGroup
from antiphon.device.generic import GenericStreams
from antiphon.device.generic_cpu import PretendedDevice
from antiphon.models.moe import Experts
from tests.engine.traffic import Traffic, of_engines

_REFUSED = "operation not permitted when stream is capturing"


@dataclass(slots=True)
class FakeGraph:
    run: Callable[[], Any]
    result: None = None
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.run()


@contextmanager
def fake_graphs(*, fails_at: int = -1, inside: bool = False) -> Iterator[list[FakeGraph]]:
    """Let the pretended accelerator capture. Yields the graphs made.

    fails_at: the number of a capture that raises. inside: in the middle of the first layer, for a transport that sends
    nothing, because a capture would not either.
    """
    graphs: list[FakeGraph] = []
    num_captures = 0

    def capture(streams: GenericStreams, run: Callable[[], Any]) -> FakeGraph:
        nonlocal num_captures
        num_captures += 1
        if num_captures == fails_at + 1:
            if inside:
                with mock.patch.object(Experts, "combine", side_effect=RuntimeError(_REFUSED)):
                    run()
            raise RuntimeError(_REFUSED)
        graphs.append(FakeGraph(run))
        return graphs[-1]

    with (
        mock.patch.object(PretendedDevice, "capturable", True),
        mock.patch.object(GenericStreams, "capture", capture),
    ):
        yield graphs


def of_engines_that_capture(
    group: RankGroup, traffic: Traffic, arms: list[dict[str, Any]], fails_at_by_rank: list[int] | None = None
) -> list[dict[str, Any]]:
    """`of_engines` under `fake_graphs`."""
    with fake_graphs(fails_at=-1 if fails_at_by_rank is None else fails_at_by_rank[group.rank]):
        return of_engines(group, traffic, arms)
