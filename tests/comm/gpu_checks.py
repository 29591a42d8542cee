"""Checks that need devices. Every function runs on all ranks at the same time."""

from __future__ import annotations

import random
import time

import torch

from antiphon.comm import RankGroup
from antiphon.comm.slab.mailbox import Phase
from antiphon.comm.slab.transport import SlabTransport
from antiphon.runtime import finish, run_lanes, streams_for
from tests.comm.protocol_checks import run_layers
from tests.comm.world import MAX_TOKENS, World, exact_sums, make_shape, poison_arrivals
from tests.support.protocol_log import LoggedEvent, record

__all__ = ["logs_of_two_lanes", "many_iterations"]


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
