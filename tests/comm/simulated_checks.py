"""The `simulated` transport over real ranks: when things arrive, and what the wait costs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from antiphon.comm import Link, load_transport, parse_transport
from antiphon.comm.simulated import SimulatedTransport
from antiphon.runtime import CpuStreams, EventKind, LaneEvent, finish, run_lanes
from tests.comm.world import World, apply_experts, make_shape, make_tokens

__all__ = ["communications_queue_on_the_link"]

_BANDWIDTH_S = 0.08
"""Time that the bytes of one dispatch take on the modelled link."""

_LATENCY_S = 0.02
_SLACK_S = 1.0
"""How late a peer may send. `test_simulated` tests with its own clock that the model is exact."""


@dataclass(slots=True)
class _Stopwatch:
    """A recorder that keeps when the data of each pending arrived."""

    ready_s: dict[tuple[int, str], float]

    def on_event(self, event: LaneEvent) -> None:
        if event.kind is EventKind.ARRIVED and event.ready_ns is not None:
            self.ready_s[event.lane, event.label] = event.ready_ns * 1e-9


def communications_queue_on_the_link(world: World, name: str) -> None:
    """Two lanes dispatch one after the other, and the second has to wait for the bytes of the first."""
    shape = make_shape(torch.float32, hidden_size=32)
    tokens = make_tokens(shape, 40, seed=world.rank)
    counts = (40,) * world.size
    num_bytes = _bytes_of_dispatch(world, name)
    link = Link(bytes_per_s=num_bytes / _BANDWIDTH_S, latency_s=_LATENCY_S)
    inner = load_transport(parse_transport(name))(shape, group=world.group, streams=CpuStreams(), num_lanes=2)
    transport = SimulatedTransport(inner, link)
    sent_s: list[tuple[float, float, float]] = []
    waited_s: list[float] = []

    def lane() -> None:
        before = time.perf_counter()
        pending = transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts, label="timed")
        sent_s.append((before, time.perf_counter(), link.latency_s * pending.num_messages))
        rows = finish(pending)
        waited_s.append(time.perf_counter() - sent_s[0][0])
        sums_TD = finish(transport.combine(apply_experts(rows, shape, world.group), label="timed"))
        world.expect_sums(sums_TD, tokens)

    watch = _Stopwatch({})
    world.barrier()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    run_lanes([lane, lane], recorder=watch)
    elapsed_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s

    first, second = (watch.ready_s[lane, "dispatch timed"] for lane in (0, 1))
    (first_s, first_back_s, latency_s), (_, second_back_s, _) = sent_s
    _expect_between(world, first, first_s, first_back_s, _BANDWIDTH_S + latency_s, "first dispatch")
    _expect_between(world, second, first_s, second_back_s, 2 * _BANDWIDTH_S + latency_s, "second dispatch")
    world.expect(waited_s[0] >= _BANDWIDTH_S + latency_s, f"rows came after {waited_s[0]:.3f} s")
    world.expect(waited_s[1] >= 2 * _BANDWIDTH_S + latency_s, f"rows of lane 1 came after {waited_s[1]:.3f} s")
    world.expect(cpu_s < 0.5 * elapsed_s, f"{cpu_s:.3f} s of processor time in {elapsed_s:.3f} s of waiting")


def _bytes_of_dispatch(world: World, name: str) -> int:
    """The bytes of the timed dispatch, found without a simulated link."""
    shape = make_shape(torch.float32, hidden_size=32)
    tokens = make_tokens(shape, 40, seed=world.rank)
    transport = world.make(name, shape)
    pending = transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=(40,) * world.size)
    finish(pending)
    return pending.num_bytes


def _expect_between(
    world: World, ready_s: float, sent_s: float, latest_start_s: float, model_s: float, what: str
) -> None:
    world.expect(ready_s >= sent_s + model_s - 1e-6, f"{what} was there {ready_s - sent_s:.4f} s after it was sent")
    late_s = ready_s - latest_start_s - model_s
    world.expect(late_s < _SLACK_S, f"{what} was there {late_s:.4f} s later than the link model says")
