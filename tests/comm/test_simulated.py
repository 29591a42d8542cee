"""The link model of `simulated` over a transport that sends nothing, with a clock that only the model advances."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from antiphon.comm import ExpertShape, Flight, Link, RankGroup, Routes, Rows, Transport, simulated
from antiphon.comm.simulated import SimulatedTransport
from antiphon.runtime import CpuStreams, EventKind, LaneEvent, finish, run_lanes

SHAPE = ExpertShape(num_experts=2, top_k=1, hidden_size=4, dtype=torch.float32)
X_TD = torch.randn(3, 4)
ROUTES = Routes(torch.tensor([[0], [1], [1]]), torch.rand(3, 1))


class Instant(Transport):
    """Claims to send `num_bytes` in `num_messages`, is done at once, and notes its calls."""

    name = "instant"

    def __init__(self, *, num_bytes: int, num_messages: int = 1, late: bool = False) -> None:
        super().__init__(SHAPE, group=RankGroup(rank=0, size=1), streams=CpuStreams(), num_lanes=3)
        self.num_bytes = num_bytes
        self.num_messages = num_messages
        self.late = late
        self.calls: list[str] = []

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        return self._flight(lambda: self.rows(x_TD, routes.ids_TK, routes.weights_TK))

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        return self._flight(lambda: partial_RD)

    def _flight(self, result: Callable[[], object]) -> Flight:
        def wait() -> object:
            self.calls.append("wait")
            return result()

        return Flight(
            wait=wait,
            launch=(lambda: self.calls.append("launch")) if self.late else None,
            num_bytes=self.num_bytes,
            num_messages=self.num_messages,
        )


@dataclass(slots=True)
class Clock:
    """Stands in for the module `time`: sleeping is the only thing that takes time."""

    now_ns: int = 5_000_000_000
    naps_s: list[float] = field(default_factory=list)

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.naps_s.append(seconds)
        self.now_ns += round(seconds * 1e9)

    @property
    def now_s(self) -> float:
        return self.now_ns * 1e-9 - 5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(simulated, "time", clock)
    return clock


class ArrivalTimes:
    """A recorder of when the data of every pending arrived, in order of arrival."""

    def __init__(self) -> None:
        self.ready_s: list[float] = []

    def on_event(self, event: LaneEvent) -> None:
        if event.kind is EventKind.ARRIVED:
            assert event.ready_ns is not None
            self.ready_s.append(event.ready_ns * 1e-9 - 5)


def about(*seconds: float) -> object:
    return pytest.approx(list(seconds), abs=1e-6)


def dispatch_and_combine(transport: Transport) -> None:
    finish(transport.combine(finish(transport.dispatch(X_TD, ROUTES)).x_RD))


@pytest.mark.parametrize(("num_bytes", "num_messages"), [(40_000, 1), (0, 2), (20_000, 2), (0, 0)])
def test_arrival_is_latency_and_bytes(clock: Clock, num_bytes: int, num_messages: int) -> None:
    link = Link(bytes_per_s=1e6, latency_s=0.02)
    transport = SimulatedTransport(Instant(num_bytes=num_bytes, num_messages=num_messages), link)
    pending = transport.dispatch(X_TD, ROUTES)
    assert clock.naps_s == [], "dispatch must not wait"
    assert (pending.num_bytes, pending.num_messages) == (num_bytes, num_messages)
    rows = finish(pending)
    assert torch.equal(rows.x_RD, X_TD)
    assert [clock.now_s] == about(link.duration_s(num_bytes, num_messages))


def test_communications_queue_for_bandwidth_but_not_for_latency(clock: Clock) -> None:
    transport = SimulatedTransport(Instant(num_bytes=40_000), Link(bytes_per_s=1e6, latency_s=0.03))
    times = ArrivalTimes()
    run_lanes([lambda: finish(transport.dispatch(X_TD, ROUTES))] * 3, recorder=times)
    assert times.ready_s == about(0.04 + 0.03, 2 * 0.04 + 0.03, 3 * 0.04 + 0.03)
    assert [clock.now_s] == about(0.15)


def test_an_idle_link_does_not_queue(clock: Clock) -> None:
    transport = SimulatedTransport(Instant(num_bytes=20_000), Link(bytes_per_s=1e6, latency_s=0))
    dispatch_and_combine(transport)
    clock.sleep(1)
    dispatch_and_combine(transport)
    assert [clock.now_s] == about(1.08)


def test_time_that_passes_before_the_wait_counts(clock: Clock) -> None:
    """What compute covers is not waited for again."""
    transport = SimulatedTransport(Instant(num_bytes=50_000), Link(bytes_per_s=1e6, latency_s=0))
    pending = transport.dispatch(X_TD, ROUTES)
    clock.sleep(0.02)
    finish(pending)
    assert clock.naps_s == about(0.02, 0.03)
    pending = transport.combine(X_TD)
    clock.sleep(0.07)
    finish(pending)
    assert clock.naps_s == about(0.02, 0.03, 0.07)


def test_late_launch_occupies_the_link_when_it_is_launched(clock: Clock) -> None:
    inner = Instant(num_bytes=40_000, late=True)
    transport = SimulatedTransport(inner, Link(bytes_per_s=1e6, latency_s=0.01))
    pending = transport.dispatch(X_TD, ROUTES)
    clock.sleep(1)
    assert inner.calls == []
    finish(pending)
    assert inner.calls == ["launch", "wait"]
    assert [clock.now_s] == about(1.05)


def test_the_wait_leaves_the_processor_to_others() -> None:
    """By the real clock."""
    transport = SimulatedTransport(Instant(num_bytes=300_000), Link(bytes_per_s=1e6, latency_s=0))
    start, start_cpu = time.perf_counter(), time.process_time()
    finish(transport.dispatch(X_TD, ROUTES))
    assert time.perf_counter() - start >= 0.3
    assert time.process_time() - start_cpu < 0.1
