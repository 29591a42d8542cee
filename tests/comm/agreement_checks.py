"""The agreement and the debug mode that compares the order of collectives, over real ranks."""

from __future__ import annotations

import torch

from antiphon.core.errors import PeerError
from antiphon.core.plan import Proposal, SerialReason
from antiphon.planning import exchange
from antiphon.runtime import finish
from tests.comm.world import World, make_shape, make_tokens


def proposals_are_the_same_everywhere(world: World) -> None:
    for step in range(10):
        expected = [_proposal(step, rank) for rank in range(world.size)]
        proposals = exchange(world.group, expected[world.rank])
        world.expect_equal(proposals, expected, f"step {step}")
        world.expect(len(set(world.group.all_gather_object(repr(proposals)))) == 1, f"step {step} differs by rank")


def different_policies_are_refused(world: World) -> None:
    mine = _plain(num_tokens=3, policy=world.rank // (world.size - 1))
    _expect_peer_error(world, mine, "different options", f"[{', '.join('0' * (world.size - 1))}, 1]")
    world.expect_equal(len(exchange(world.group, _plain(num_tokens=3))), world.size, "the next exchange")


def policies_may_differ_while_a_message_is_under_way(world: World) -> None:
    """Without work, and until all ranks have seen the newest message, one rank may be ahead of the others."""
    mine = _plain(num_tokens=0, policy=world.rank, wave=world.rank)
    world.expect_equal(len(exchange(world.group, mine)), world.size, "proposals")


def different_orders_are_named(world: World) -> None:
    world.group.record_order()
    try:
        _gather(world, "before")
        _gather(world, "dispatch layer 3" if world.rank == 0 else "combine layer 3")
        mine = _plain(order=world.group.order_fingerprint())
        others = [f"rank {rank}: combine layer 3" for rank in range(1, world.size)]
        _expect_peer_error(world, mine, "collective 1 differs: rank 0: dispatch layer 3", *others)
    finally:
        world.group._order = None


def a_missing_collective_is_named(world: World) -> None:
    world.group.record_order()
    try:
        _gather(world, "all")
        if world.rank == 0:
            world.group._order.append("one more")
        mine = _plain(order=world.group.order_fingerprint())
        _expect_peer_error(world, mine, "collective 1 differs: rank 0: one more; rank 1: agreement")
    finally:
        world.group._order = None


def an_order_recorded_by_some_ranks_only_is_refused(world: World) -> None:
    if world.rank == 0:
        world.group.record_order()
    try:
        _gather(world, "all")
        _expect_peer_error(world, _plain(order=world.group.order_fingerprint()), "different collectives")
    finally:
        world.group._order = None


def equal_orders_have_equal_fingerprints(world: World) -> None:
    world.expect_equal(world.group.order_fingerprint(), 0, "fingerprint when nothing is recorded")
    shape = make_shape()
    transport = world.make("alltoall", shape)
    world.group.record_order()
    try:
        seen = []
        for step in range(3):
            tokens = make_tokens(shape, step + world.rank, seed=world.rank)
            world.run(transport, tokens, None)
            fingerprint = world.group.order_fingerprint()
            proposals = exchange(world.group, _plain(order=fingerprint))
            world.expect_equal({p.order for p in proposals}, {fingerprint}, f"fingerprints of step {step}")
            seen.append(fingerprint)
            world.group.clear_order()
        world.expect_equal(len(set(seen)), 1, "different fingerprints of three equal steps")
        world.expect(seen[0] > 0, "a recorded order has the fingerprint of none")
        finish(transport.dispatch(tokens.x_TD, tokens.routes))
        world.expect(world.group.order_fingerprint() != seen[0], "half a step has the fingerprint of a whole one")
    finally:
        world.group._order = None


def _proposal(step: int, rank: int) -> Proposal:
    tokens = 100 * step + rank
    return Proposal(
        num_tokens=tokens,
        decode_only=bool((step + rank) % 2),
        part_tokens=(tokens,) if rank % 2 else tuple(range(2 + step % 7)),
        refusal=SerialReason(rank % 3),
        wave=2**40 + step,
        policy=2**32 - 1,
    )


def _plain(*, num_tokens: int = 0, policy: int = 0, wave: int = 0, order: int = 0) -> Proposal:
    return Proposal(
        num_tokens=num_tokens, decode_only=False, part_tokens=(num_tokens,), policy=policy, wave=wave, order=order
    )


def _gather(world: World, label: str) -> None:
    world.group.all_gather(torch.empty(world.size), torch.zeros(1), label).wait()


def _expect_peer_error(world: World, proposal: Proposal, *texts: str) -> None:
    try:
        exchange(world.group, proposal)
    except PeerError as error:
        for text in texts:
            world.expect(text in str(error), f"the message lacks {text!r}: {error}")
    except Exception as error:
        world.expect(False, f"PeerError was expected, not {error!r}")
    else:
        world.expect(False, "no PeerError")
