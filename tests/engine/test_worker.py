"""The loop of a worker, with a fake engine whose outputs are given."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from antiphon import LLM, SamplingParams
from antiphon.core.plan import Plan
from antiphon.engine.messages import Stop, Tokens, Warned, Work, decode_from_worker, encode
from antiphon.engine.scheduling.request import NewToken, TokenOutput
from antiphon.engine.step import StepResult
from antiphon.engine.worker import KeptWarnings, Worker
from antiphon.frontend.worker_client import RankWarnings

BUSY = Plan(part_tokens=((3,),), reason="test")
IDLE = Plan(part_tokens=((0,),), reason="test", idle=True)
TOKEN = TokenOutput(request_id=7, token=NewToken(token_id=5))


class Scheduler:
    def __init__(self) -> None:
        self.requests: dict[int, Any] = {}

    def add(self, requests: Any) -> None:
        assert not list(requests)

    def abort(self, request_ids: list[int]) -> None:
        assert not request_ids


class Engine:
    """A fake engine. outputs: those of each step; after the last, no rank has work."""

    def __init__(self, *outputs: list[TokenOutput]) -> None:
        self.scheduler = Scheduler()
        self.wave = 0
        self._outputs = list(outputs)

    def step(self) -> StepResult:
        if not self._outputs:
            return StepResult(IDLE, [])
        return StepResult(BUSY, self._outputs.pop(0))


@pytest.fixture
def sockets() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """The sockets of the frontend and of the worker."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as front, context.socket(zmq.PAIR) as worker:
        front.bind("inproc://worker")
        worker.connect("inproc://worker")
        yield front, worker


@pytest.mark.parametrize(("sign_s", "said"), [(0.0, [[], [TOKEN], []]), (1000.0, [[TOKEN]])])
def test_steps_without_a_token_give_a_sign_from_time_to_time(
    sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]], sign_s: float, said: list[list[TokenOutput]]
) -> None:
    """Otherwise the frontend would take a long prompt for silence, and end the ranks."""
    front, socket = sockets
    for message in (Work(wave=1), Stop(wave=2)):
        front.send(encode(message))
    engine: Any = Engine([], [TOKEN], [])
    Worker(socket, engine, sign_s=sign_s).run()
    found = []
    while front.poll(0):
        message = decode_from_worker(front.recv())
        assert isinstance(message, Tokens)
        found.append(message.outputs)
    assert found == said
    assert engine.wave == 2


# ---- warnings of the ranks


def test_warnings_go_to_the_frontend_after_the_step_that_logs_them(
    sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
) -> None:
    front, socket = sockets
    for message in (Work(wave=1), Stop(wave=2)):
        front.send(encode(message))
    kept = KeptWarnings()
    logger = logging.Logger("antiphon.kernels")
    logger.addHandler(kept)

    class Warning(Engine):
        def step(self) -> StepResult:
            if self._outputs:
                logger.warning("%d %% is slow", len(self._outputs))
                logger.info("nothing")
                logger.error("comes with Failed")
            return super().step()

    engine: Any = Warning([], [TOKEN])
    Worker(socket, engine, sign_s=1000.0, warnings=kept).run()
    found = []
    while front.poll(0):
        found.append(decode_from_worker(front.recv()))
    warned = [Warned(logger="antiphon.kernels", text=f"{number} % is slow") for number in (2, 1)]
    assert found == [*warned, Tokens(outputs=[TOKEN])]


def test_the_frontend_logs_once_what_all_ranks_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    warnings = RankWarnings()
    for text in ("100 % slow", "100 % slow", "and more", "100 % slow"):
        warnings.log(Warned(logger="antiphon.kernels", text=text))
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("antiphon.kernels", "WARNING", "100 % slow"),
        ("antiphon.kernels", "WARNING", "and more"),
    ]


@pytest.mark.processes
def test_warnings_of_ranks_reach_the_user_once(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(ranks=2, transport="tests.support.transports:Warns", dbo="off", device="cpu") as llm:
        assert caplog.messages == ["this transport is slow: time; patience"]
        llm.generate("Once upon a time", SamplingParams(max_tokens=3))
        llm.stats()
    assert caplog.messages == ["this transport is slow: time; patience", "rank 1 is tired"]
