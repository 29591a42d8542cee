"""Transports that break on purpose; workers load them by `tests.support.transports:Name`."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from greenlet import getcurrent

from antiphon.comm import Flight, Routes, Rows
from antiphon.comm.collective.alltoall import AllToAllTransport
from antiphon.comm.slab.copy_engine import CopyEngineTransport
from antiphon.comm.slab.host_staged import HostStagedTransport
from antiphon.comm.slab.mailbox import Exchange, Phase
from antiphon.comm.slab.one_sided import OneSidedTransport
from antiphon.comm.slab.shared_memory import SharedMemoryTransport
from antiphon.core.warn_once import warn_once
from antiphon.engine.worker import report_and_exit


class NoGreenlets(AllToAllTransport):
    """Fails in a lane that is a greenlet of its own."""

    name = "no-greenlets"

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        if getcurrent().parent is not None:
            raise ValueError(f"a greenlet reached {label} on lane {lane}")
        return super().send_tokens(lane, x_TD, routes, tokens_by_rank, label)


class Warns(AllToAllTransport):
    """All ranks warn of the same at the start, and rank 1 of something else in each of its steps."""

    name = "warns"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        warn_once("this transport is slow", cost="time", remedy="patience")

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        if self.group.rank == 1:
            logging.getLogger("antiphon.comm").warning("rank %d is tired", self.group.rank)
            logging.getLogger("antiphon.comm").info("and says so")
        return super().send_partials(lane, partial_RD, label)


class StopsInCombine(AllToAllTransport):
    """Rank 1 sleeps for ever in its third combine."""

    name = "stops-in-combine"
    num_combines = 0

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        self.num_combines += 1
        if self.group.rank == 1 and self.num_combines == 3:
            time.sleep(1e6)
        return super().send_partials(lane, partial_RD, label)


class _SlabThatStops(SharedMemoryTransport):
    """Rank 1 sleeps for ever before its third exchange of a phase."""

    phase: ClassVar[Phase]
    num_exchanges = 0

    def _send(self, exchange: Exchange, label: str) -> Flight[None]:
        self.num_exchanges += exchange.phase is self.phase
        if self.group.rank == 1 and self.num_exchanges == 3:
            time.sleep(1e6)
        return super()._send(exchange, label)


class SlabStopsInDispatch(_SlabThatStops):
    name = "slab-stops-in-dispatch"
    phase = Phase.DISPATCH


class SlabStopsInCombine(_SlabThatStops):
    name = "slab-stops-in-combine"
    phase = Phase.COMBINE


class ReportsFromAnotherThread(AllToAllTransport):
    """Rank 1 hangs in its third combine, and a thread of its own ends the process, as the watch over a device does."""

    name = "reports-from-another-thread"
    num_combines = 0

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        self.num_combines += 1
        if self.group.rank == 1 and self.num_combines == 3:
            folder = Path(sys.argv[sys.argv.index("--folder") + 1])
            report = partial(report_and_exit, f"rank 1 is stuck in {label}", rank=1, folder=folder)
            threading.Timer(0.2, report).start()
            time.sleep(1e6)
        return super().send_partials(lane, partial_RD, label)


class DiesInCombine(AllToAllTransport):
    """Rank 1 ends without a word in its third combine."""

    name = "dies-in-combine"
    num_combines = 0

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        self.num_combines += 1
        if self.group.rank == 1 and self.num_combines == 3:
            os._exit(7)
        return super().send_partials(lane, partial_RD, label)


class LoadsSlowly(AllToAllTransport):
    """Rank 1 takes 4 s to load its weights; when they have them, the ranks exchange something within the time limit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        from antiphon.engine import build

        group, load_weights, allocate_cache = self.group, build.load_weights, build.allocate_cache

        def slow(checkpoint: Any, targets: Any, *, progress: Any) -> None:
            targets = list(targets)

            def told(found: Any) -> None:
                if group.rank == 1:
                    time.sleep(4 / len(targets))
                progress(found)

            load_weights(checkpoint, targets, progress=told)

        def after_an_exchange(*places: Any, **sizes: Any) -> Any:
            group.all_gather(torch.empty(group.size), torch.zeros(1), "what a device needs").wait()
            return allocate_cache(*places, **sizes)

        build.load_weights, build.allocate_cache = slow, after_an_exchange


# ---- a peer that stops before a replay, on GPUs


def _without_replay(kind: type[Any]) -> type[Any]:
    """The transport, whose rank 1 launches a few captured steps and then no more, while its process lives on."""

    class WithoutReplay(kind):  # type: ignore[misc]
        capture_obstacle = ""
        num_replays = 0

        def before_replay(self) -> None:
            super().before_replay()
            self.num_replays += 1
            if self.group.rank == 1 and self.num_replays > 20:
                time.sleep(1000)

    return WithoutReplay


CopyEngineWithoutReplay = _without_replay(CopyEngineTransport)
HostStagedWithoutReplay = _without_replay(HostStagedTransport)
OneSidedWithoutReplay = _without_replay(OneSidedTransport)
