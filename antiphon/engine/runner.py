"""Runs the micro-batches of a step through the model, one lane each. The lanes overlap here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from antiphon.core.batch import MicroBatch, use_micro_batch
from antiphon.models import CausalLM
from antiphon.runtime import Recorder, Streams, run_lanes

__all__ = ["Runner"]


class Runner:
    """Holds the model of this rank. reserved_sms: `Transport.num_sms`, which a split step leaves free."""

    def __init__(self, model: CausalLM, *, streams: Streams, recorder: Recorder | None = None) -> None:
        self.model = model
        self.reserved_sms = 0
        self._streams = streams
        self._recorder = recorder

    @torch.inference_mode()
    def run(self, parts: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Hidden states [T, D] of every part, on the device. One part runs without lanes, by the same code."""
        parts = [
            part.to(self._streams.device) for part in parts
        ]  # outside the lanes: all copies before the first layer
        functions = [partial(self._forward, part) for part in parts]
        with self._streams.leave_free(self.reserved_sms if len(parts) > 1 else 0):
            return run_lanes(functions, streams=self._streams, recorder=self._recorder)

    def _forward(self, part: MicroBatch) -> torch.Tensor:
        with use_micro_batch(part):
            return self.model(part.token_ids_T, part.positions_T)
