"""The parts of a transport that benchmarks run alone, checked on every rank."""

from __future__ import annotations

import torch

from antiphon.bench.parts import TransportPart, part_of
from antiphon.comm import RankGroup, Transport, create_transport
from antiphon.runtime import CpuStreams, finish, run_lanes
from tests.comm.world import Tokens, apply_experts, make_shape, make_tokens

NUM_LANES = 2


def check_parts(group: RankGroup, name: str) -> list[str]:
    """The problems found; empty if there are none."""
    shape = make_shape()
    transport = create_transport(name, shape, group=group, streams=CpuStreams(), num_lanes=NUM_LANES, max_tokens=32)
    counts = tuple(9 + 2 * rank for rank in range(group.size))
    tokens = make_tokens(shape, counts[group.rank], seed=group.rank)
    group.record_order()

    def run(part: TransportPart) -> tuple[list[torch.Tensor], int]:
        """One exchange on every lane, and whether collectives were issued."""
        group.clear_order()
        nothing = group.order_fingerprint()
        used = part_of(transport, part)
        results = run_lanes([lambda: exchange(used, tokens, counts)] * NUM_LANES, streams=used.streams)
        return results, group.order_fingerprint() != nothing

    problems = []
    whole, whole_sent = run(TransportPart.WHOLE)
    alone, alone_sent = run(TransportPart.COMPUTE_ONLY)
    if alone_sent:
        problems.append("the computation alone issued collectives")
    # The buffers hold what the whole exchange left there, so the sums are the same.
    if not all(torch.equal(left, right) for left, right in zip(whole, alone, strict=True)):
        problems.append("the computation alone gives other sums")
    _, link_sent = run(TransportPart.LINK_ONLY)
    if link_sent != whole_sent:
        problems.append("the link alone issues collectives where a whole exchange does not, or the other way round")
    again, _ = run(TransportPart.WHOLE)
    if not all(torch.equal(left, right) for left, right in zip(whole, again, strict=True)):
        problems.append("a whole exchange after the parts gives other sums")
    return problems


def exchange(transport: Transport, tokens: Tokens, counts: tuple[int, ...]) -> torch.Tensor:
    rows = finish(transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts))
    return finish(transport.combine(apply_experts(rows, transport.shape, transport.group)))
