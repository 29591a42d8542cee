"""What each rank runs in `antiphon bench decode`: one engine, and this for every context and number of sequences:

    prefill until all sequences decode
    for repeat:            serial | dual | eager         plans interleaved, in reverse order every other repeat
        set the plan, 2 untimed steps, meet, `steps` timed steps, drain
    replay the captured steps back to back: their time on the device, and their kernels

The first repeat is a warm-up and shows which plans can run at all. All ranks have equal sequences, so that all of them
change the plan between the same steps.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import torch

from antiphon.bench.arm_clock import meet, tell
from antiphon.bench.decode.floor import ModelBytes, copy_bandwidth
from antiphon.bench.decode.kernels import kernel_table, profile_kernels
from antiphon.bench.decode.options import UNTIMED_STEPS, DecodeOptions
from antiphon.comm import RankGroup
from antiphon.core.batch import Batch
from antiphon.core.errors import first_line
from antiphon.core.plan import Plan, plan_kind
from antiphon.core.policy import OverlapPolicy
from antiphon.core.sampling import ResolvedParams
from antiphon.device.table import device_of
from antiphon.engine.build import build_engine
from antiphon.engine.scheduling.request import Request
from antiphon.engine.step import StepEngine
from antiphon.machine.versions import versions
from antiphon.models.decoder import Decoder

_COPY_BYTES = {"cpu": 32 * 2**20, "cuda": 1280 * 2**20}
_REPLAYS = 20
_PROFILED_REPLAYS = 5


@dataclass(slots=True, kw_only=True)
class Cell:
    """One plan of one number of sequences and one context, on one rank.

    launch: "captured", "padded" or "eager". context: tokens that a sequence attends to, its newest one included; the
    mean over all timed steps. device_ms: of a captured step replayed back to back.
    """

    sequences: int
    context_len: int
    plan: str
    not_run: str = ""
    launch: str = ""
    ms: list[float] = field(default_factory=list)  # a step, of each repeat
    contexts: list[float] = field(default_factory=list)
    device_ms: float | None = None
    kernels: dict[str, Any] | None = None  # on rank 0


def measure_decode(group: RankGroup, device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every cell. options: fields of `DecodeOptions`."""
    asked = DecodeOptions(**options)
    owner = device_of(device)
    bandwidth = copy_bandwidth(owner, _COPY_BYTES[asked.device])
    tell(group, f"copies move {bandwidth / 1e9:.0f} GB/s")
    config = asked.resolve()
    engine = build_engine(config, group)
    captured = engine.captured
    tell(group, f"engine ready, {captured.num_graphs} steps captured in {captured.time_s:.1f} s")
    bench = Bench(engine, asked, vocab_size=config.model.vocab_size)
    cells = []
    for context_len in asked.contexts:
        for sequences in asked.sequences:
            found = bench.measure(sequences, context_len)
            cells += [asdict(cell) for cell in found]
            told = ", ".join(f"{cell.plan} {min(cell.ms):.2f} ms" for cell in found if not cell.not_run)
            tell(group, f"{sequences} sequences, context {context_len}: {told or 'not run'}")
    model = engine.runner.model
    assert isinstance(model, Decoder)
    return {
        "device": owner.describe(),
        "versions": versions(),
        "model": {
            "architecture": config.model.architecture,
            "layers": config.model.num_layers,
            "hidden_size": config.model.hidden_size,
            "experts": config.model.num_experts,
            "top_k": config.model.top_k,
        },
        "model_bytes": asdict(ModelBytes.of(model, kv_itemsize=config.dtype.itemsize)),
        "copy_bytes_per_s": bandwidth,
        "transport": engine.transport.name,
        "data_path": engine.transport.data_path.value,
        "dtype": config.dtype_name,
        "graphs": asdict(captured),
        "cells": cells,
    }


class Bench:
    """The engine of one rank and the plans that it can be set to. All ranks must call its methods together."""

    def __init__(self, engine: StepEngine, options: DecodeOptions, *, vocab_size: int) -> None:
        self._engine = engine
        self._options = options
        self._vocab_size = vocab_size
        self._device = engine.transport.streams.owner
        self._request_ids = count()

    def measure(self, sequences: int, context_len: int) -> list[Cell]:
        """All plans, interleaved."""
        plans = self._options.plans
        cells = [Cell(sequences=sequences, context_len=context_len, plan=plan) for plan in plans]
        if reason := self._too_large(sequences, context_len):
            for cell in cells:
                cell.not_run = reason
            return cells
        requests = self._requests(sequences, context_len)
        self._prefill(requests)
        for repeat in range(1 + self._options.repeats):
            for cell in cells if repeat % 2 == 0 else cells[::-1]:
                if not cell.not_run:
                    self._run(cell, requests, counts=repeat > 0)
        for cell in cells:
            if cell.launch == "captured" and not cell.not_run:
                with self._set(cell.plan):
                    self._replay(cell)
        self._engine.scheduler.abort([request.request_id for request in requests])
        return cells

    def _too_large(self, sequences: int, context_len: int) -> str:
        pool = self._engine.scheduler.pool
        length = context_len + self._options.room(sequences, context_len)
        needed = sequences * (pool.blocks_for(length) + 1)
        if needed <= pool.num_usable:
            return ""
        return (
            f"{sequences} texts of up to {length} tokens need {needed} blocks, and the KV cache has {pool.num_usable}"
        )

    def _requests(self, sequences: int, context_len: int) -> list[Request]:
        seed, rank = self._options.seed, self._engine.group.rank
        source = random.Random(f"{seed} {rank} {sequences} {context_len}")
        max_tokens = self._options.room(sequences, context_len) + 1
        return [
            Request(
                request_id=next(self._request_ids),
                prompt_ids=tuple(source.randrange(self._vocab_size) for _ in range(context_len)),
                params=ResolvedParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
                max_tokens=max_tokens,
                seed=seed,
            )
            for _ in range(sequences)
        ]

    def _prefill(self, requests: Sequence[Request]) -> None:
        """Step until all requests decode. Their lengths are equal on all ranks, so all ranks take as many steps."""
        with self._set("eager"):
            self._engine.step(requests)
            while any(request.num_computed < len(request.prompt_ids) for request in requests):
                self._engine.step()
            self._engine.drain()

    @contextmanager
    def _set(self, plan: str) -> Iterator[None]:
        """Run steps by this plan in the context, if the planner agrees."""
        planner = self._engine.planner
        ladders, policy = planner.ladders, planner.policy
        if plan == "eager":
            planner.ladders = {}
        self._engine.reconfigure(OverlapPolicy(dbo="on" if plan == "dual" else "off"))
        try:
            yield
        finally:
            planner.ladders = ladders
            self._engine.reconfigure(policy)

    def _run(self, cell: Cell, requests: Sequence[Request], *, counts: bool) -> None:
        """One repeat of one plan. counts: whether its time does; the check of the plan always does."""
        engine, num_steps = self._engine, self._options.num_steps(cell.plan)
        with self._set(cell.plan):
            for _ in range(UNTIMED_STEPS):
                engine.step()
            engine.drain()
            context = sum(request.num_tokens for request in requests) / len(requests) + (num_steps - 1) / 2
            before = engine.stats.to_dict()
            self._device.synchronize()
            meet(engine.group)
            started = time.perf_counter()
            for _ in range(num_steps):
                engine.step()
            engine.drain()
            self._device.synchronize()
            ms = (time.perf_counter() - started) * 1e3 / num_steps
            launch, reason = self._judge(cell.plan, num_steps, before, engine.stats.to_dict())
        reasons = engine.group.all_gather_object(reason)
        cell.not_run, cell.launch = next(filter(None, reasons), ""), launch
        if counts and not cell.not_run:
            cell.ms.append(ms)
            cell.contexts.append(context)

    def _judge(self, plan: str, num_steps: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str]:
        """How the steps were launched, and why they are not what was asked for; "" if they are."""
        kind = plan_kind(2 if plan == "dual" else 1)
        if _grown(before["steps_by_plan"], after["steps_by_plan"]) != {kind: num_steps}:
            return "", f"not split: {_words(_grown(before['serial_reasons'], after['serial_reasons']))}"
        replayed, padded = (after["graphs"][name] - before["graphs"][name] for name in ("replayed", "padded"))
        launch = "captured" if replayed == num_steps else "padded" if padded == num_steps else "eager"
        wanted = "eager" if plan == "eager" else "captured" if self._device.capturable else "padded"
        if launch == wanted and (plan != "eager" or not padded):
            return launch, ""
        reasons = _grown(before["graphs"]["eager_reasons"], after["graphs"]["eager_reasons"])
        return launch, f"not {wanted}: {_words(reasons)}"

    def _replay(self, cell: Cell) -> None:
        """The time of the next step on the device, and its kernels. Replays change nothing that the step would not."""
        with self._engine.transport.streams.current():
            self._replay_on_current_stream(cell)

    def _replay_on_current_stream(self, cell: Cell) -> None:
        engine = self._engine
        batch = engine.scheduler.next_batch()
        plan = engine.planner.agree(batch, engine.group, wave=engine.wave)
        timer = self._device.timer()
        self._device.synchronize()
        meet(engine.group)
        self._replays(batch, plan, 2)  # the host is ahead from here on
        timer.start()
        self._replays(batch, plan, _REPLAYS)
        cell.device_ms = timer.elapsed_ms(timer.stop()) / _REPLAYS
        if self._options.kernels:
            self._profile(cell, batch, plan)

    def _replays(self, batch: Batch, plan: Plan, number: int) -> None:
        assert self._engine.padded is not None
        for _ in range(number):
            self._engine.padded.fill(batch, plan, {})
            self._engine.padded.launch(plan)

    def _profile(self, cell: Cell, batch: Batch, plan: Plan) -> None:
        """Profile replays on rank 0. A profiler that fails costs the table only: the peers wait for the replays."""
        begun = ended = False

        def run() -> None:
            nonlocal begun, ended
            begun = True
            meet(self._engine.group)  # starting a profile takes seconds
            self._replays(batch, plan, _PROFILED_REPLAYS)
            self._device.synchronize()
            ended = True

        if self._engine.group.rank == 0:
            try:
                runs = profile_kernels(run)
                table = kernel_table(runs, num_steps=_PROFILED_REPLAYS, most=self._options.kernels)
                cell.kernels = table.to_dict()
            except Exception as error:
                if begun and not ended:
                    raise
                tell(self._engine.group, f"no kernel table of {cell.plan} steps: {first_line(error)}")
        if not begun:
            run()


def _grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return dict(Counter(after) - Counter(before))


def _words(reasons: Mapping[str, int]) -> str:
    return ", ".join(reasons) or "for no stated reason"
