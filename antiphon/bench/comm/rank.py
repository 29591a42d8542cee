"""What each rank runs in `antiphon bench comm`: exchanges of each size, alone and beside computation.

One exchange is the link part of a dispatch and its combine. Lanes alternate after each exchange, so that buffers rotate
and only one exchange is in flight at a time.

    alone     dispatch ─────► combine ─────►
    beside    dispatch ─────► combine ─────►      each phase is sent, then the computation is queued,
              ==compute===    ==compute===        then the compute stream waits for the arrival
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from antiphon.bench.arm_clock import ArmClock, tell
from antiphon.bench.comm.bodies import UNITS, Body, make_body
from antiphon.bench.parts import TransportPart, part_of
from antiphon.comm import ExpertShape, RankGroup, Routes, Transport, create_transport
from antiphon.comm.row_format import RowFormat
from antiphon.core.errors import AntiphonError
from antiphon.device.table import device_of
from antiphon.machine.versions import versions
from antiphon.runtime import run_lanes, streams_for, switch

NUM_LANES = 2
TOP_K = 8
_EXPERTS_PER_RANK = 8
_WARM_UPS = 2
_ARM_MS = 10.0  # an arm runs as many exchanges as take about this long
_CHECKED_EXCHANGES = 4
_MOST_EXCHANGES = 100
_TUNING_ROUNDS = 3
_LARGEST_ERROR = 0.02  # relative, of the bfloat16 sums over ranks


class WrongSumError(AntiphonError, RuntimeError):
    """A transport returned something other than what was sent."""


class _Exchanges:
    """Exchanges of `num_tokens` tokens per rank over one transport. Every token goes to every rank."""

    def __init__(self, transport: Transport, num_tokens: int) -> None:
        shape, device = transport.shape, transport.streams.device
        self.transport = transport
        self._link = part_of(transport, TransportPart.LINK_ONLY)
        row_bytes = RowFormat(shape).row_bytes + shape.hidden_size * shape.dtype.itemsize
        self.num_bytes = (transport.group.size - 1) * num_tokens * row_bytes  # from a rank to its peers, in both phases
        self._tokens_by_rank = (num_tokens,) * transport.group.size
        generator = torch.Generator(device).manual_seed(transport.group.rank)
        self._x_TD = torch.randn(num_tokens, shape.hidden_size, generator=generator, device=device).to(shape.dtype)
        self._routes = _to_all_ranks(transport, num_tokens)

    def run(self, count: int, compute: Callable[[], None] | None = None) -> None:
        """`count` exchanges, a multiple of the lanes, with `compute` queued beside every phase."""
        each = count // NUM_LANES
        run_lanes([partial(self._lane, each, compute)] * NUM_LANES, streams=self.transport.streams)

    def check(self) -> None:
        """Check whole exchanges on every lane, with experts that return their input: each sum is W times the token.

        There are several, because some transports handle a repeated exchange differently.
        """
        for _ in range(_CHECKED_EXCHANGES):
            results = run_lanes([self._whole] * NUM_LANES, streams=self.transport.streams)
        expected_TD = self._x_TD.float() * self.transport.group.size
        for lane, out_TD in enumerate(results):
            error = float((out_TD.float() - expected_TD).norm() / expected_TD.norm())
            if not error <= _LARGEST_ERROR:
                raise WrongSumError(
                    f"transport {self.transport.name!r}, lane {lane}, {self._x_TD.shape[0]} tokens: sums differ from "
                    f"what was sent by {error:.3g} of their norm; its times would be meaningless"
                )

    def _lane(self, count: int, compute: Callable[[], None] | None) -> None:
        for _ in range(count):
            sent = self._link.dispatch(self._x_TD, self._routes, tokens_by_rank=self._tokens_by_rank)
            if compute is not None:
                compute()
            rows = sent.wait()
            back = self._link.combine(rows.x_RD if rows.out_RD is None else rows.out_RD)
            if compute is not None:
                compute()
            back.wait()
            switch("the next exchange")

    def _whole(self) -> torch.Tensor:
        rows = self.transport.dispatch(self._x_TD, self._routes, tokens_by_rank=self._tokens_by_rank).wait()
        out_TD = self.transport.combine(rows.x_RD.contiguous()).wait()
        switch("the next exchange")
        return out_TD


def _to_all_ranks(transport: Transport, num_tokens: int) -> Routes:
    """Routes that send every token to every rank, with weights of 1."""
    shape, num_ranks, device = transport.shape, transport.group.size, transport.streams.device
    ids = [(k % num_ranks) * transport.experts_per_rank + k // num_ranks for k in range(shape.top_k)]
    ids_TK = torch.tensor(ids, device=device).expand(num_tokens, -1).contiguous()
    return Routes(ids_TK, torch.ones(num_tokens, shape.top_k, dtype=shape.weight_dtype, device=device))


def measure_exchanges(group: RankGroup, device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """Measure every size over every transport. options: fields of `CommOptions`. Times are in ms, one per repeat."""
    streams = streams_for(device)
    shape = ExpertShape(
        num_experts=_EXPERTS_PER_RANK * group.size,
        top_k=TOP_K,
        hidden_size=options["hidden_size"],
        dtype=torch.bfloat16,
    )
    peer_row_bytes = RowFormat(shape).row_bytes * max(1, group.size - 1)
    tokens_by_size = {size: max(1, round(size / peer_row_bytes)) for size in options["sizes"]}
    transports = {
        name: create_transport(
            name,
            shape,
            group=group,
            streams=streams,
            num_lanes=NUM_LANES,
            max_tokens=max(tokens_by_size.values()),
            peer_access=options["peer_access"],
        )
        for name in options["transports"]
    }
    bodies = [make_body(name, device) for name in options["beside"]]
    clock = ArmClock(group, device)
    tell(group, f"{len(transports)} transports ready")
    cells = []
    for size, num_tokens in tokens_by_size.items():
        trials = {name: _Exchanges(transport, num_tokens) for name, transport in transports.items()}
        beside = bodies if size >= options["beside_from"] else []
        measured = _measure_size(group, clock, trials, beside, repeats=options["repeats"])
        for name, times in measured.items():
            cells.append({"transport": name, "size_bytes": size, "tokens": num_tokens, **times})
        tell(group, f"measured exchanges of {size} bytes")
    return {"device": device_of(device).describe(), "versions": versions(), "cells": cells}


@torch.inference_mode()
def _measure_size(
    group: RankGroup, clock: ArmClock, trials: dict[str, _Exchanges], bodies: Sequence[Body], *, repeats: int
) -> dict[str, dict[str, Any]]:
    """All arms of all transports interleaved, after warming up, checking and sizing each transport."""
    counts, units = {}, {}
    for name, trial in trials.items():
        trial.check()
        exchange_ms = _warm_time(group, clock, trial)
        count = NUM_LANES * math.ceil(_ARM_MS / exchange_ms / NUM_LANES)
        counts[name] = min(count, _MOST_EXCHANGES)
        units[name] = {body.name: _units_for(group, clock, body, exchange_ms / 2) for body in bodies}
    cells: dict[str, dict[str, Any]] = {
        name: {
            "exchanges": counts[name],
            "num_bytes": trial.num_bytes,
            "exchange_ms": [],
            "beside": {
                body.name: {"size": body.size, "units": units[name][body.name], "compute_ms": [], "both_ms": []}
                for body in bodies
            },
        }
        for name, trial in trials.items()
    }
    for repeat in range(_WARM_UPS + repeats):
        for name, trial in trials.items():
            cell, count = cells[name], counts[name]
            alone = clock.measure(partial(trial.run, count)).elapsed_ms / count
            if repeat >= _WARM_UPS:
                cell["exchange_ms"].append(alone)
            for body in bodies:
                compute = partial(body.run, units[name][body.name])
                computing = clock.measure(partial(_repeat, compute, 2 * count)).elapsed_ms / count
                both = clock.measure(partial(trial.run, count, compute)).elapsed_ms / count
                if repeat >= _WARM_UPS:
                    cell["beside"][body.name]["compute_ms"].append(computing)
                    cell["beside"][body.name]["both_ms"].append(both)
    return cells


def _repeat(run: Callable[[], None], count: int) -> None:
    for _ in range(count):
        run()


def _warm_time(group: RankGroup, clock: ArmClock, trial: _Exchanges) -> float:
    """Approximate time of an exchange in ms, the same on all ranks."""
    elapsed_ms = 0.0
    for count in (NUM_LANES, NUM_LANES, 4 * NUM_LANES):
        elapsed_ms = clock.measure(partial(trial.run, count)).elapsed_ms / count
    return float(max(1e-3, *group.all_gather_object(elapsed_ms)))


def _units_for(group: RankGroup, clock: ArmClock, body: Body, target_ms: float) -> int:
    """Units of computation that take about `target_ms`, the same on all ranks.

    Tuned in rounds, because the time of small launches is not proportional to their units.
    """
    units = UNITS
    for _ in range(_TUNING_ROUNDS):
        body.run(units)
        elapsed_ms = clock.measure(partial(_repeat, partial(body.run, units), 4)).elapsed_ms / 4
        slowest_ms = max(1e-6, *group.all_gather_object(elapsed_ms))
        units = max(1, round(units * target_ms / slowest_ms))
    return units
