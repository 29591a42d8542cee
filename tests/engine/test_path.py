"""The path of a request through the rooms, traced from `LLM.generate` to the kernels and back.

A room is a folder of `antiphon/`. Every call of one of its functions is traced, with two exceptions: the loop over the
layers, where every layer visits the same rooms again, and `core`, whose data types are used everywhere.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest

import antiphon
from antiphon import LLM, SamplingParams

PACKAGE = Path(antiphon.__file__).parent
MOST_CHANGES = 25
"""Limit of changes of room for one token, down and up together."""


class Tracer:
    """Traces the calls of this thread. changes: the rooms in order, with one entry for each change."""

    def __init__(self) -> None:
        self.changes: list[str] = []
        self.entered: Counter[str] = Counter()
        self.kernels: set[str] = set()
        self._stack: list[tuple[str, bool]] = []  # calls under way: room, is loop over layers?
        self._rooms: dict[str, str] = {}
        self._loops = 0

    def __enter__(self) -> Tracer:
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            room, name = self._room(frame.f_code.co_filename), frame.f_code.co_name
            is_loop = room == "models" and name == "run_layers"
            if room == "kernels":
                self.kernels.add(name)
            if room and not self._loops and self._now() != room:
                self.entered[room] += 1
            self._stack.append((room, is_loop))
            self._loops += is_loop
        elif event == "return" and self._stack:
            self._loops -= self._stack.pop()[1]
        if not self._loops and (room := self._now()) and self.changes[-1:] != [room]:
            self.changes.append(room)

    def _now(self) -> str:
        return next((room for room, _ in reversed(self._stack) if room), "")

    def _room(self, file: str) -> str:
        if file not in self._rooms:
            path = Path(file)
            inside = path.relative_to(PACKAGE).parts[:-1] if path.is_relative_to(PACKAGE) else ()
            self._rooms[file] = inside[0] if inside and inside[0] != "core" else ""
        return self._rooms[file]


def trace(llm: LLM, num_tokens: int) -> Tracer:
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    llm.generate("Once", params)  # warm-up
    with Tracer() as tracer:
        (output,) = llm.generate("The ship", params)
    assert len(output.token_ids) == num_tokens
    return tracer


@pytest.mark.parametrize("dbo", ["off", "on"])
def test_a_request_enters_each_room_once_on_its_way_down_and_once_on_its_way_up(dbo: str) -> None:
    with LLM(dbo=dbo) as llm:
        tracer = trace(llm, 1)
    assert {"frontend", "engine", "planning", "splitting", "runtime", "models", "kernels"} <= tracer.entered.keys()
    assert {"rms_norm", "grouped_experts"} <= tracer.kernels, "the trace has not reached the kernels"
    if dbo == "off":
        assert len(tracer.changes) - 1 <= MOST_CHANGES, " ".join(tracer.changes)
        assert max(tracer.entered.values()) <= 2, tracer.entered
        assert tracer.entered["engine"] == tracer.entered["planning"] == tracer.entered["runtime"] == 1
    assert tracer.changes[0] == tracer.changes[-1] == "frontend"


def test_each_token_is_one_more_step() -> None:
    with LLM() as llm:
        one, three = trace(llm, 1), trace(llm, 3)
    prepared = 2 * 2  # before the layers of the two steps that decode, their attention goes to the kernels and back
    assert len(three.changes) - 1 == 3 * (len(one.changes) - 1) + prepared
