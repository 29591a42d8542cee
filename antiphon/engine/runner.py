"""Runs the micro-batches of a step through the model, one lane each. This is where the lanes overlap.

If only some layers are split, the other layers run on one lane, over the whole batch of the rank:

    lane 0   begin ── layers before ─┬─ layers in lanes ─┬─ layers after ── finish
    lane 1                           └─ layers in lanes ─┘
                                    cut                 join
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from antiphon.core.batch import MicroBatch
from antiphon.kernels.dispatch import no_cuda_kernels
from antiphon.models import CausalLM, run_micro_batch
from antiphon.runtime import LaneEvent, Recorder, Streams, run_lanes
from antiphon.splitting import cut_tensors, join_tensors


class Runner:
    """Runs the model of this rank. reserved_sms: SMs that split steps leave free (`Transport.num_sms`)."""

    def __init__(self, model: CausalLM, *, streams: Streams, recorder: Recorder | None = None) -> None:
        self.model = model
        self.reserved_sms = 0
        self._fused_kernels = streams.owner.fused_kernels
        self._num_layers = model.num_layers
        self._streams = streams
        self._recorder = recorder

    @contextmanager
    def listening(self) -> Iterator[list[LaneEvent]]:
        """Collect the events of the runs inside the context, instead of passing them to the recorder."""
        collected = _Events()
        before, self._recorder = self._recorder, collected
        try:
            yield collected.events
        finally:
            self._recorder = before

    @torch.inference_mode()
    def run(
        self, parts: Sequence[MicroBatch], *, whole: MicroBatch | None = None, layers: slice = slice(None)
    ) -> list[torch.Tensor]:
        """Return the hidden states [T, D] of each part, on the device. All ranks must call it with the same `layers`.

        layers: those that run in lanes. whole: the unsplit micro-batch, on which the other layers run; needed if there
        are any. The result may then be one tensor for all parts: `splitting.join` takes either.
        """
        # Copy outside the lanes, so that no copy is queued between layers.
        parts = [self._on_device(part) for part in parts]
        in_lanes = range(self._num_layers)[layers]
        if len(parts) == 1 or len(in_lanes) == self._num_layers:
            hidden = self._run_lanes(parts)
            return [rows_TD[: part.num_tokens] for rows_TD, part in zip(hidden, parts, strict=True)]
        assert whole is not None, f"layers {in_lanes} of {self._num_layers} are split; the others need `whole`"
        whole = self._on_device(whole)
        before, after = range(in_lanes.start), range(in_lanes.stop, self._num_layers)
        states: list[Any] = []
        for micro_batches, some_layers in (([whole], before), (parts, in_lanes), ([whole], after)):
            if some_layers:
                states = self._run_lanes(micro_batches, some_layers, states)
        return states

    def _on_device(self, part: MicroBatch) -> MicroBatch:
        return part.to(self._streams.device, pin_memory=self._streams.owner.pinned_memory)

    def _run_lanes(
        self, parts: Sequence[MicroBatch], layers: range | None = None, states: Sequence[Any] = ()
    ) -> list[Any]:
        """Run `layers`, by default all, with one lane per part.

        states: what the layers before returned for the same tokens; they may have been cut otherwise.
        """
        begun: Sequence[Any] = [None] * len(parts)
        if states:
            begun = cut_tensors(join_tensors(states), [part.num_tokens for part in parts])
        functions = [
            partial(run_micro_batch, self.model, part, layers, state) for part, state in zip(parts, begun, strict=True)
        ]
        carve_out = self._streams.leave_free(self.reserved_sms) if len(parts) > 1 else nullcontext()
        kernels = nullcontext() if self._fused_kernels else no_cuda_kernels()
        with carve_out, kernels:
            return run_lanes(functions, streams=self._streams, recorder=self._recorder)


class _Events:
    """A recorder that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[LaneEvent] = []

    def on_event(self, event: LaneEvent) -> None:
        self.events.append(event)
