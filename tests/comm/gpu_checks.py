"""Checks that need devices. Every function runs on all ranks at the same time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from antiphon.comm import RankGroup, Transport
from antiphon.comm.slab.mailbox import Exchange, Phase
from antiphon.comm.slab.transport import SlabTransport
from antiphon.runtime import find_device, finish, run_lanes, streams_for
from tests.comm.protocol_checks import run_layers
from tests.comm.world import MAX_TOKENS, World, exact_sums, make_shape, poison_arrivals
from tests.support.protocol_log import LoggedEvent, record

__all__ = ["logs_of_two_lanes", "many_iterations", "replays_between_eager_steps", "small_exchanges"]

_NUM_LAYERS = 4
_PADDED = (3, MAX_TOKENS)
"""Tokens per lane and rank in the captured steps. With rows of 32 KiB, the large ones go in chunks."""


def many_iterations(group: RankGroup, name: str, num_iterations: int) -> str:
    """Two lanes, changing sizes, naps of the host, and poison behind every reader; sums must be exact to the last bit.

    Results are compared on the device and read once at the end, so that the host never waits for it.
    """
    device = torch.device("cuda", group.rank)
    torch.cuda.set_device(device)
    world = World(group, streams_for(device))
    shape = make_shape(torch.bfloat16, top_k=4, hidden_size=64)
    transport = world.make(name, shape, num_lanes=2)
    sizes, naps = random.Random(7), random.Random(group.rank)
    known = [world.tokens(shape, n, seed=n) for n in range(MAX_TOKENS + 1)]
    expected = [exact_sums(shape, group, tokens) for tokens in known]
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def layer(counts: tuple[int, ...]) -> None:
        tokens = known[counts[group.rank]]
        rows = finish(transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts))
        partial_RD = _partials(rows, shape, group)
        poison_arrivals(transport, Phase.DISPATCH)
        sums_TD = finish(transport.combine(rows.out_RD.copy_(partial_RD)))
        wrong.add_((sums_TD != expected[counts[group.rank]]).sum())
        poison_arrivals(transport, Phase.COMBINE)

    for number in range(num_iterations // 2):
        both = [tuple(sizes.choice([0, 1, sizes.randrange(MAX_TOKENS + 1)]) for _ in range(2)) for _ in range(2)]
        if naps.random() < 0.01:
            time.sleep(naps.random() * 5e-3)
        run_lanes([lambda c=counts: layer(c) for counts in both], streams=world.streams)
        if number % 500 == 499:
            torch.cuda.synchronize()
    return f"{int(wrong)} numbers are wrong" if int(wrong) else ""


def logs_of_two_lanes(group: RankGroup, name: str) -> list[LoggedEvent]:
    """What a slab transport queued in several steps of two lanes of unequal length. The largest slabs go in chunks."""
    device = torch.device("cuda", group.rank)
    torch.cuda.set_device(device)
    world = World(group, streams_for(device))
    transport = world.make(name, make_shape(torch.float32, top_k=2, hidden_size=1 << 14), num_lanes=2)
    assert isinstance(transport, SlabTransport)
    log, sizes = record(transport), random.Random(11)
    for step in range(5):
        lanes = [
            [[sizes.choice([0, 1, MAX_TOKENS]) for _ in range(group.size)] for _ in range(n)] for n in (4, 6 + step)
        ]
        run_layers(transport, lanes, streams=world.streams)
    torch.cuda.synchronize()
    return log.events


def small_exchanges(group: RankGroup, name: str, num_iterations: int) -> str:
    """One lane, where small exchanges go by kernel: every size around the edges of slices, then many in turn.

    Slabs have 16 bytes to 2 MiB. Boxes are poisoned behind every reader; sums must be exact to the last bit. A few
    exchanges have other numbers of tokens on each rank, and the largest are too large, so copy engines come in between.
    """
    device = torch.device("cuda", group.rank)
    torch.cuda.set_device(device)
    world = World(group, streams_for(device))
    sizes, naps = random.Random(5), random.Random(group.rank)
    problems = []
    for hidden_size in (8, 1024, 4096, 1 << 14):
        shape = make_shape(torch.bfloat16, top_k=4, hidden_size=hidden_size)
        transport = world.make(name, shape)
        assert isinstance(transport, SlabTransport)
        num_kernels = _count_kernels(transport)
        known = {n: world.tokens(shape, n, seed=n) for n in (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64)}
        expected = {n: exact_sums(shape, group, tokens) for n, tokens in known.items()}
        wrong = {n: torch.zeros((), dtype=torch.int64, device=device) for n in known}

        def layer(counts: tuple[int, ...]) -> None:
            n = counts[group.rank]
            rows = finish(transport.dispatch(known[n].x_TD, known[n].routes, tokens_by_rank=counts))  # noqa: B023
            partial_RD = _partials(rows, shape, group)  # noqa: B023
            poison_arrivals(transport, Phase.DISPATCH)  # noqa: B023
            sums_TD = finish(transport.combine(rows.out_RD.copy_(partial_RD)))  # noqa: B023
            wrong[n].add_((sums_TD != expected[n]).sum())  # noqa: B023
            poison_arrivals(transport, Phase.COMBINE)  # noqa: B023

        steps = [(n,) * group.size for n in known]
        for _ in range(num_iterations // 4):
            uneven = tuple(sizes.choice([*known]) for _ in range(group.size))
            steps.append(uneven if sizes.random() < 0.1 else (sizes.choice([*known]),) * group.size)
        for number, counts in enumerate(steps):
            if naps.random() < 0.01:
                time.sleep(naps.random() * 5e-3)
            run_lanes([partial(layer, counts)], streams=world.streams)
            if number % 500 == 499:
                torch.cuda.synchronize()
        problems += [f"{int(n)} numbers of {size} tokens are wrong" for size, n in wrong.items() if int(n)]
        if num_kernels() < num_iterations // 4:
            problems.append(f"hidden size {hidden_size}: only {num_kernels()} exchanges went by kernel")
    return "; ".join(problems)


def _count_kernels(transport: SlabTransport) -> Callable[[], int]:
    """Count the exchanges that go by kernel from now on."""
    mailbox: Any = transport.mailbox
    inner, calls = mailbox.put_by_kernel, []

    def put_by_kernel(exchange: Exchange) -> None:
        calls.append(exchange.label)
        inner(exchange)

    mailbox.put_by_kernel = put_by_kernel
    return lambda: len(calls)


def replays_between_eager_steps(group: RankGroup, name: str, num_replays: int, num_lanes: int) -> str:
    """Replays of two sizes with new inputs each, against eager steps with the same inputs, to the last bit.

    Eager steps of other sizes run in between. Results are poisoned before each replay, and compared on the device.
    With one lane, small exchanges may go by kernel.
    """
    owner = find_device("cuda", group.rank)
    owner.activate()
    world = World(group, owner.streams(own_compute=True))
    transport = world.make(name, make_shape(torch.bfloat16, top_k=4, hidden_size=1 << 14), num_lanes=num_lanes)
    choice = random.Random(3)
    padded = {n: _Step(world, transport, [(n,) * group.size] * num_lanes) for n in _PADDED}
    changing = [
        _Step(
            world,
            transport,
            [tuple(choice.choice([0, 1, 17, 64]) for _ in range(group.size)) for _ in range(num_lanes)],
        )
        for _ in range(3)
    ]
    for step in (*padded.values(), *changing):
        step.fill(seed=0)
        for _ in range(2):  # everything has run before it is captured, and a layout may be replayed by its medium
            step.expected = step.run()
    captured = {n: world.streams.capture(step.run) for n, step in padded.items()}
    transport.freeze()
    for number in range(num_replays):
        n = choice.choice(_PADDED)
        step, replay = padded[n], captured[n]
        step.fill(seed=number)
        if number % 3 == 0:
            step.expected = step.run()
        for result in replay.result:
            result.fill_(torch.nan)
        transport.before_replay()
        replay.replay()
        if number % 3:
            replayed = [result.clone() for result in replay.result]
            step.expected = step.run()
            step.compare(replayed)
        else:
            step.compare(replay.result)
        if number % 4 == 0:
            other = changing[number // 4 % len(changing)]
            other.compare(other.run())
    torch.cuda.synchronize()
    wrong = sum(int(step.wrong) for step in (*padded.values(), *changing))
    return f"{wrong} numbers are wrong" if wrong else ""


class _Step:
    """Layers on lanes over inputs at fixed addresses. counts: tokens of every rank, for each lane."""

    def __init__(self, world: World, transport: Transport, counts: list[tuple[int, ...]]) -> None:
        self._world = world
        self._transport = transport
        self._counts = counts
        self._inputs = [world.tokens(transport.shape, lane[world.rank], seed=0) for lane in counts]
        self.expected: list[torch.Tensor] = []
        self.wrong = torch.zeros((), dtype=torch.int64, device=world.streams.device)

    def fill(self, *, seed: int) -> None:
        """Write other tokens and routes into the inputs."""
        for lane, into in enumerate(self._inputs):
            new = self._world.tokens(self._transport.shape, len(into.x_TD), seed=(seed, lane, self._world.rank))
            into.x_TD.copy_(new.x_TD)
            into.routes.ids_TK.copy_(new.routes.ids_TK)
            into.routes.weights_TK.copy_(new.routes.weights_TK)

    def run(self) -> list[torch.Tensor]:
        lanes = [partial(self._lane, lane) for lane in range(len(self._counts))]
        return run_lanes(lanes, streams=self._world.streams)

    def compare(self, results: list[torch.Tensor]) -> None:
        for result, expected in zip(results, self.expected, strict=True):
            self.wrong.add_((result != expected).sum())

    def _lane(self, lane: int) -> torch.Tensor:
        tokens, transport, counts = self._inputs[lane], self._transport, self._counts[lane]
        x_TD = tokens.x_TD
        for layer in range(_NUM_LAYERS):
            label = f"layer {layer}"
            rows = finish(transport.dispatch(x_TD, tokens.routes, tokens_by_rank=counts, label=label))
            partial_RD = _partials(rows, transport.shape, self._world.group)
            if rows.out_RD is not None:
                partial_RD = rows.out_RD.copy_(partial_RD)
            x_TD = (x_TD + finish(transport.combine(partial_RD, label=label))) * 0.03
        return x_TD


def _partials(rows, shape, group):  # type: ignore[no-untyped-def]
    """`apply_experts` without waiting for the device."""
    per_rank = shape.experts_per_rank(group.size)
    out_RD = torch.zeros(rows.x_RD.shape, dtype=torch.float32, device=rows.x_RD.device)
    x_RD = rows.x_RD.float()
    for local in range(per_rank):
        number = group.rank * per_rank + local
        y_RD = x_RD * (number + 1) + x_RD.roll(number + 1, dims=-1)
        chosen_RK = rows.ids_RK == local
        weight_R = rows.weights_RK.masked_fill(~chosen_RK, 0).sum(1)
        out_RD += torch.where(chosen_RK.any(1, keepdim=True), y_RD * weight_R.unsqueeze(1), 0)
    return out_RD.to(shape.dtype)
