"""The frontend's interface to the ranks, and its implementation for one rank in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from antiphon.comm import RankGroup
from antiphon.config.engine_config import ResolvedConfig
from antiphon.core.errors import EngineError
from antiphon.core.policy import OverlapPolicy
from antiphon.engine.build import build_engine, ready_message
from antiphon.engine.messages import Ready
from antiphon.engine.scheduling.request import Request, TokenOutput
from antiphon.engine.step import StepEngine
from antiphon.timeline import StepTimeline


class Client(Protocol):
    """The frontend's interface to the ranks. After an error every call raises `EngineError`.

    ready: what the ranks reported once they had started.
    """

    ready: Ready

    def submit(self, requests_by_rank: Sequence[Sequence[Request]]) -> None:
        """Start requests; item r is for rank r."""
        ...

    def abort(self, request_ids: Sequence[int]) -> None:
        """Cancel requests, and return when all ranks have forgotten them. Does nothing once the engine has ended."""
        ...

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Cancel requests without waiting for the ranks: tokens of these requests may still arrive."""
        ...

    def poll(self) -> list[TokenOutput]:
        """Wait, up to a time limit, for a message from a rank. Returns the outputs since the last call, if any."""
        ...

    def reconfigure(self, policy: OverlapPolicy) -> None:
        """Change the policy on all ranks. No request may be open."""
        ...

    def statistics(self) -> list[dict[str, Any]]:
        """Return `StepEngine.statistics` of every rank."""
        ...

    def timelines(self) -> list[list[StepTimeline]]:
        """Return the timelines of the last steps of every rank."""
        ...

    def close(self) -> None:
        """Stop all workers. Calling it again does nothing."""
        ...


class InProcessClient:
    """One rank in this process, without a worker."""

    def __init__(self, config: ResolvedConfig, on_start: Callable[[str], None] | None = None) -> None:
        """on_start: called at every stage of the start."""
        say = on_start or (lambda what: None)
        engine = build_engine(config, RankGroup(rank=0, size=1), report=lambda starting: say(str(starting)))
        self.ready = ready_message(engine)
        self._engine: StepEngine | None = engine
        self._ended = ""
        self._submitted: list[Request] = []  # for the next step

    def submit(self, requests_by_rank: Sequence[Sequence[Request]]) -> None:
        self._running()
        self._submitted += requests_by_rank[0]

    def abort(self, request_ids: Sequence[int]) -> None:
        if self._engine is not None:
            self._submitted = [request for request in self._submitted if request.request_id not in set(request_ids)]
            self._engine.scheduler.abort(request_ids)

    def cancel(self, request_ids: Sequence[int]) -> None:
        self.abort(request_ids)

    def poll(self) -> list[TokenOutput]:
        engine = self._running()
        try:
            submitted, self._submitted = self._submitted, []
            return engine.step(submitted).outputs
        except Exception as error:
            self._ended = f"a step failed on rank 0: {type(error).__name__}: {error}"
            raise EngineError(self._ended) from error
        except BaseException:  # Ctrl-C: the caller aborts its requests; what is in flight is taken by the next step
            engine.transport.reset()
            raise

    def reconfigure(self, policy: OverlapPolicy) -> None:
        self._running().reconfigure(policy)

    def statistics(self) -> list[dict[str, Any]]:
        return [self._running().statistics()]

    def timelines(self) -> list[list[StepTimeline]]:
        return [list(self._running().recorder.steps)]

    def close(self) -> None:
        self._ended = self._ended or "it was closed"
        if self._engine is not None:
            device = self._engine.transport.streams.owner
            self._engine = None  # frees weights and cache now, not when the caller drops the LLM
            with suppress(RuntimeError):  # if the device has failed, that was reported before
                device.release_unused()

    def _running(self) -> StepEngine:
        if self._ended or self._engine is None:
            raise EngineError("this engine has ended", limit=self._ended, remedy="make a new LLM")
        return self._engine
