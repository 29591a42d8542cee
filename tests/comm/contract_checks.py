"""The contract of `antiphon.comm.transport`, check by check. Every function here runs on all ranks at once.

Each takes the world, the name of a transport, and what its table entry adds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from antiphon.comm import ExpertShape, Routes
from antiphon.core.errors import AntiphonError, LaneError, OptionError
from antiphon.runtime import current_lane, finish, run_lanes, switch
from tests.comm.world import (
    MAX_TOKENS,
    Tokens,
    World,
    apply_experts,
    exact_sums,
    make_shape,
    make_tokens,
    poison_buffers,
)

__all__ = ["SCENARIOS", "SLAB_TRANSPORTS", "transports_of"]

SLAB_TRANSPORTS = ("shared-memory", "copy-engine", "host-staged", "one-sided")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """How many tokens the ranks have and where they go."""

    counts: tuple[int, int, int, int]  # the first W are used
    top_k: int = 3
    hidden_size: int = 5
    to_last_rank: bool = False


SCENARIOS = {
    "different-counts": Scenario(counts=(5, 2, 9, 1)),
    "rows-of-16-bytes": Scenario(counts=(4, 6, 1, 3), top_k=2, hidden_size=8),
    "some-ranks-idle": Scenario(counts=(0, 6, 0, 3)),
    "one-rank-busy": Scenario(counts=(7, 0, 0, 0)),
    "all-ranks-idle": Scenario(counts=(0, 0, 0, 0)),
    "all-to-the-last-rank": Scenario(counts=(4, 5, 6, 7), top_k=2, to_last_rank=True),
    "one-expert": Scenario(counts=(8, 3, 1, 6), top_k=1, hidden_size=3),
    "all-experts": Scenario(counts=(3, 8, 2, 4), top_k=8),
}


def sums_are_right(world: World, name: str, scenario: Scenario, dtype: torch.dtype) -> None:
    shape = make_shape(dtype, top_k=scenario.top_k, hidden_size=scenario.hidden_size)
    per_rank = shape.experts_per_rank(world.size)
    experts = range(shape.num_experts - per_rank, shape.num_experts) if scenario.to_last_rank else None
    counts = scenario.counts[: world.size]
    transport = world.make(name, shape)
    for turn, known in enumerate([counts, None, counts]):
        tokens = world.tokens(shape, counts[world.rank], seed=(turn, world.rank), experts=experts)
        world.expect_sums(world.run(transport, tokens, known), tokens, f"turn {turn}, tokens_by_rank={known}:")


def sums_are_exact(world: World, name: str, dtype: torch.dtype) -> None:
    """Slab transports give exactly the sum of every rank's partial sums in rank order, to the last bit."""
    shape = make_shape(dtype, top_k=5, hidden_size=11)
    transport = world.make(name, shape)
    for turn in range(10):
        counts = tuple((7 * rank + 3 * turn) % 13 for rank in range(world.size))
        tokens = world.tokens(shape, counts[world.rank], seed=(turn, world.rank))
        sums_TD = world.run(transport, tokens, counts)
        world.expect(torch.equal(sums_TD, exact_sums(shape, world.group, tokens)), f"turn {turn}: not the exact sums")


def buffers_are_written_before_they_are_read(world: World, name: str, num_iterations: int) -> None:
    """Iterations grow and shrink, over buffers that are filled with NaN in between."""
    shape = make_shape()
    transport = world.make(name, shape)
    sizes = random.Random(5)
    num_poisoned = 0
    for turn in range(num_iterations):
        limit = 1 + turn % 40
        counts = tuple(sizes.choice([0, limit, sizes.randrange(limit)]) for _ in range(world.size))
        tokens = world.tokens(shape, counts[world.rank], seed=(turn, world.rank))
        known = counts if turn % 3 else None
        world.expect_sums(world.run(transport, tokens, known), tokens, f"iteration {turn}, counts {counts}:")
        num_poisoned += poison_buffers(transport)
    world.expect(num_poisoned > 0 or transport.name == "local", "no buffer was poisoned")


def lanes_interleave(world: World, name: str, num_lanes: int) -> None:
    """Every lane runs a chain of layers of different length, interleaved phase by phase with the other lanes."""
    shape = make_shape(hidden_size=7)
    transport = world.make(name, shape, num_lanes=num_lanes)
    order: list[tuple[str, int, int]] = []

    def run_chain() -> None:
        lane = current_lane()
        for layer in range(2 + lane):
            counts = tuple((3 * rank + 5 * lane + layer) % 7 for rank in range(world.size))
            tokens = world.tokens(shape, counts[world.rank], seed=(lane, layer, world.rank))
            order.append(("dispatch", layer, lane))
            rows = finish(transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts))
            switch("rows must stay valid while the other lanes dispatch")
            order.append(("combine", layer, lane))
            sums_TD = finish(transport.combine(apply_experts(rows, shape, world.group)))
            world.expect_sums(sums_TD, tokens, f"lane {lane}, layer {layer}:")

    run_lanes([run_chain] * num_lanes)
    expected = [
        (phase, layer, lane)
        for layer in range(1 + num_lanes)
        for phase in ("dispatch", "combine")
        for lane in range(num_lanes)
        if layer < 2 + lane
    ]
    world.expect_equal(order, expected, "order of phases")


def results_belong_to_the_caller(world: World, name: str) -> None:
    """The result of combine survives later communications and poisoned buffers."""
    shape = make_shape()
    transport = world.make(name, shape)
    kept = []
    for turn in range(6):
        tokens = world.tokens(shape, 2 + (turn + world.rank) % 5, seed=(turn, world.rank))
        kept.append((world.run(transport, tokens, None), tokens))
        poison_buffers(transport)
    for turn, (sums_TD, tokens) in enumerate(kept):
        world.expect_sums(sums_TD, tokens, f"result {turn}, looked at in the end:")


def result_is_not_the_partial_sums(world: World, name: str) -> None:
    """The result of combine is new, so the tensor that went in may be reused."""
    shape = make_shape()
    transport = world.make(name, shape)
    tokens = world.tokens(shape, 4, seed=world.rank)
    rows = finish(transport.dispatch(tokens.x_TD, tokens.routes))
    partial_RD = apply_experts(rows, shape, world.group)
    sums_TD = finish(transport.combine(partial_RD))
    partial_RD.fill_(float("nan"))
    world.expect_sums(sums_TD, tokens, "after the partial sums were overwritten:")


def sources_are_read_in_dispatch(world: World, name: str) -> None:
    """On the CPU `x_TD` is read before `dispatch` returns, and may be overwritten afterwards."""
    shape = make_shape()
    transport = world.make(name, shape)
    tokens = world.tokens(shape, 4, seed=world.rank)
    x_TD, weights_TK = tokens.x_TD.clone(), tokens.routes.weights_TK.clone()
    pending = transport.dispatch(x_TD, Routes(tokens.routes.ids_TK.clone(), weights_TK))
    x_TD.fill_(float("nan"))
    weights_TK.fill_(float("nan"))
    sums_TD = finish(transport.combine(apply_experts(finish(pending), shape, world.group)))
    world.expect_sums(sums_TD, tokens, "after the sources were overwritten:")


def sources_stay_as_they_are(world: World, name: str) -> None:
    shape = make_shape()
    transport = world.make(name, shape)
    tokens = world.tokens(shape, 4, seed=world.rank)
    before = [tensor.clone() for tensor in (tokens.x_TD, tokens.routes.ids_TK, tokens.routes.weights_TK)]
    world.run(transport, tokens, None)
    after = [tokens.x_TD, tokens.routes.ids_TK, tokens.routes.weights_TK]
    world.expect(all(map(torch.equal, before, after)), "dispatch changed its sources")


def ranks_drift_apart(world: World, name: str) -> None:
    """Ranks sleep at random between phases."""
    shape = make_shape()
    transport = world.make(name, shape)
    naps = random.Random(world.rank)
    for turn in range(20):
        counts = tuple((turn + rank) % 4 for rank in range(world.size))
        tokens = world.tokens(shape, counts[world.rank], seed=(turn, world.rank))
        time.sleep(naps.random() * 4e-3)
        pending = transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts)
        time.sleep(naps.random() * 4e-3)
        back = transport.combine(apply_experts(finish(pending), shape, world.group))
        time.sleep(naps.random() * 4e-3)
        world.expect_sums(finish(back), tokens, f"turn {turn}:")


def rows_are_what_was_sent(world: World, name: str) -> None:
    """`alltoall`: one copy of a token for each rank that it goes to; `allgather`: everything, padded."""
    shape = make_shape(top_k=3)
    counts = (6, 3, 0, 9)[: world.size]
    tokens = world.tokens(shape, counts[world.rank], seed=world.rank)
    rows = finish(world.make(name, shape).dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts))
    everyone = [world.tokens(shape, count, seed=rank) for rank, count in enumerate(counts)]
    per_rank = shape.experts_per_rank(world.size)
    wanted = [(sent.routes.ids_TK // per_rank == world.rank).any(1) for sent in everyone]
    here = (rows.ids_RK >= 0).any(1)
    expected_x = torch.cat([sent.x_TD[mask] for sent, mask in zip(everyone, wanted, strict=True)])
    world.expect(torch.equal(rows.x_RD[here], expected_x), "rows are not the tokens in order of rank")
    expected_rows = {
        "local": counts[0],
        "allgather": world.size * max(counts),
        "nccl-zero-cta": world.size * max(counts),
        "alltoall": len(expected_x),
        **dict.fromkeys(SLAB_TRANSPORTS, sum(counts)),
    }[_inner_name(name)]
    world.expect_equal(rows.x_RD.shape[0], expected_rows, "rows received")
    ids_RK = torch.cat([sent.routes.ids_TK[mask] for sent, mask in zip(everyone, wanted, strict=True)])
    local_RK = torch.where(ids_RK // per_rank == world.rank, ids_RK % per_rank, -1)
    world.expect(torch.equal(rows.ids_RK[here], local_RK), "ids are not indices on this rank")
    weights_RK = torch.cat([sent.routes.weights_TK[mask] for sent, mask in zip(everyone, wanted, strict=True)])
    world.expect(torch.equal(rows.weights_RK[here], weights_RK), "weights did not travel with their tokens")


def padding_goes_nowhere(world: World, name: str) -> None:
    """Tokens with ids of -1 come back as zeros, whatever they hold, and no rank computes them."""
    shape = make_shape()
    transport = world.make(name, shape)
    for turn, num_real in enumerate([(5, 2, 0, 7), (0, 0, 0, 0), (7, 7, 7, 7)]):
        real = num_real[world.rank]
        tokens = world.tokens(shape, 7, seed=(turn, world.rank))
        tokens.x_TD[real:] = float("nan")
        tokens.routes.ids_TK[real:] = -1
        rows = finish(transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=(7,) * world.size))
        num_pairs = sum(world.group.all_gather_object(int((rows.ids_RK >= 0).sum())))
        world.expect_equal(num_pairs, shape.top_k * sum(num_real[: world.size]), f"turn {turn}: pairs computed")
        sums_TD = finish(transport.combine(apply_experts(rows, shape, world.group)))
        front = Tokens(tokens.x_TD[:real], Routes(tokens.routes.ids_TK[:real], tokens.routes.weights_TK[:real]))
        world.expect_sums(sums_TD[:real], front, f"turn {turn}, real tokens:")
        world.expect(sums_TD[real:].eq(0).all().item() is True, f"turn {turn}: padding does not come back as zeros")


def bytes_are_counted(world: World, name: str, dtype: torch.dtype) -> None:
    """The sizes that pendings report, against an independent count."""
    shape = make_shape(dtype, top_k=3, hidden_size=7)
    counts = (6, 3, 0, 9)[: world.size]
    transport = world.make(name, shape)
    tokens = world.tokens(shape, counts[world.rank], seed=world.rank)
    sent = transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts)
    back = transport.combine(apply_experts(finish(sent), shape, world.group))
    finish(back)
    rows = _remote_rows(world, _inner_name(name), shape, counts)
    world.expect_equal(sent.num_bytes, rows * _row_bytes(shape), "bytes of dispatch")
    world.expect_equal(back.num_bytes, rows * shape.hidden_size * dtype.itemsize, "bytes of combine")


def messages_are_counted(world: World, name: str) -> None:
    """The messages that a link model charges latency for: `alltoall` sends counts before its rows."""
    shape = make_shape()
    transport = world.make(name, shape)
    tokens = world.tokens(shape, 3, seed=world.rank)
    sent = transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=(3,) * world.size)
    back = transport.combine(apply_experts(finish(sent), shape, world.group))
    finish(back)
    one = int(world.size > 1)
    expected = {
        "local": (0, 0),
        "allgather": (1, 1),
        "nccl-zero-cta": (1, 1),
        "alltoall": (2, 1),
        **dict.fromkeys(SLAB_TRANSPORTS, (one, one)),
    }
    world.expect_equal((sent.num_messages, back.num_messages), expected[_inner_name(name)], "messages")


def phases_alternate(world: World, name: str) -> None:
    """Wrong orders raise before anything is sent, so the right order still works afterwards."""
    shape = make_shape()
    transport = world.make(name, shape)
    tokens = world.tokens(shape, 2, seed=world.rank)
    partial_RD = torch.zeros(2, shape.hidden_size, dtype=shape.dtype, device=world.streams.device)
    _expect_error(world, LaneError, lambda: transport.combine(partial_RD), ("combine", "lane 0", "idle"))
    sent = transport.dispatch(tokens.x_TD, tokens.routes)
    again = ("dispatch", "lane 0", "dispatching")
    _expect_error(world, LaneError, lambda: transport.dispatch(tokens.x_TD, tokens.routes), again)
    _expect_error(world, LaneError, lambda: transport.combine(partial_RD), ("combine", "lane 0", "dispatching"))
    rows = finish(sent)
    early = ("dispatch", "lane 0", "received")
    _expect_error(world, LaneError, lambda: transport.dispatch(tokens.x_TD, tokens.routes), early)
    back = transport.combine(apply_experts(rows, shape, world.group))
    _expect_error(world, LaneError, lambda: transport.combine(partial_RD), ("combine", "lane 0", "combining"))
    world.expect_sums(finish(back), tokens, "after refused calls:")


def lanes_beyond_the_last_are_refused(world: World, name: str) -> None:
    shape = make_shape()
    transport = world.make(name, shape, num_lanes=1)
    tokens = world.tokens(shape, 2, seed=world.rank)

    def in_second_lane() -> None:
        if current_lane() == 1:
            transport.dispatch(tokens.x_TD, tokens.routes)

    _expect_error(world, LaneError, lambda: run_lanes([in_second_lane] * 2), ("lane 1",), option="num_lanes", value=1)


def wrong_tokens_are_refused(world: World, name: str) -> None:
    """Tensors that do not fit raise before anything is sent."""
    shape = make_shape()
    transport = world.make(name, shape)
    tokens = world.tokens(shape, 3, seed=world.rank)
    x_TD, routes = tokens.x_TD, tokens.routes
    narrow = Routes(routes.ids_TK[:, :2], routes.weights_TK)
    for wrong_x, wrong_routes, option, names in [
        (x_TD[:, :4], routes, "x_TD", ("[3, 4]", "[T, 5]", "torch.float64")),
        (x_TD.float(), routes, "x_TD", ("[3, 5] torch.float32", "[T, 5] torch.float64")),
        (x_TD[0], routes, "x_TD", ("[5]", "torch.float64")),
        (x_TD, narrow, "routes", ("[3, 2] and [3, 3]", "need [3, 3]")),
        (x_TD, Routes(routes.ids_TK, routes.weights_TK[:2]), "routes", ("[3, 3] and [2, 3]",)),
        (x_TD[:2], routes, "routes", ("need [2, 3]",)),
    ]:
        call = partial(transport.dispatch, wrong_x, wrong_routes)
        _expect_error(world, OptionError, call, names, option=option)
    many = world.tokens(shape, MAX_TOKENS + 1, seed=world.rank)
    call = partial(transport.dispatch, many.x_TD, many.routes)
    _expect_error(world, OptionError, call, (str(MAX_TOKENS + 1),), option="max_tokens", value=MAX_TOKENS)
    world.expect_sums(world.run(transport, tokens, None), tokens, "after refused calls:")


def wrong_partial_sums_are_refused(world: World, name: str) -> None:
    """Combine raises as dispatch does: it must not broadcast too few rows or convert other dtypes."""
    shape = make_shape(top_k=8)
    transport = world.make(name, shape)
    tokens = world.tokens(shape, 4, seed=world.rank)
    rows = finish(transport.dispatch(tokens.x_TD, tokens.routes))
    partial_RD = apply_experts(rows, shape, world.group)
    for what, wrong in [
        ("one row for all", partial_RD[:1]),
        ("no row dimension", partial_RD[0]),
        ("too few rows", partial_RD[:-1]),
        ("too many rows", torch.cat([partial_RD, partial_RD])),
        ("hidden size", partial_RD[:, :1]),
        ("dtype", partial_RD.float()),
    ]:
        _expect_error(world, OptionError, partial(transport.combine, wrong), what=what, option="partial_RD")
    world.expect_sums(finish(transport.combine(partial_RD)), tokens, "after refused calls:")


def reset_forgets_a_failed_run(world: World, name: str) -> None:
    shape = make_shape()
    transport = world.make(name, shape, num_lanes=2)
    tokens = world.tokens(shape, 3, seed=world.rank)

    def fail_between_phases() -> None:
        finish(transport.dispatch(tokens.x_TD, tokens.routes))
        raise KeyError("broken expert")

    _expect_error(world, KeyError, lambda: run_lanes([fail_between_phases]), ("broken expert",))
    _expect_error(world, LaneError, lambda: transport.dispatch(tokens.x_TD, tokens.routes), ("received",))
    transport.reset()
    world.expect_sums(world.run(transport, tokens, None), tokens, "after a reset:")


def _inner_name(name: str) -> str:
    return name.split(":")[1] if name.startswith("simulated:") else name


def _expect_error(
    world: World,
    kind: type[Exception],
    call: Callable[[], object],
    names: tuple[str, ...] = (),
    *,
    what: str = "",
    option: str | None = None,
    value: object = None,
) -> None:
    """names: identifiers that the error must contain, never prose. option, value: its fields."""
    what = what or ", ".join(names)
    try:
        call()
    except kind as error:
        world.expect(all(name in str(error) for name in names), f"{what}: the message is {error}")
        if isinstance(error, AntiphonError):
            world.expect_equal((error.option, error.value), (option, value), f"{what}: option and value")
    except Exception as error:
        world.expect(False, f"{what}: {kind.__name__} was expected, not {error!r}")
    else:
        world.expect(False, f"{what}: no {kind.__name__}")


def _row_bytes(shape: ExpertShape) -> int:
    """Hidden state padded to 8 bytes, weights, and ids of 4 bytes, all padded to 16 bytes."""
    hidden = -(-shape.hidden_size * shape.dtype.itemsize // 8) * 8
    weight = 8 if shape.dtype == torch.float64 else 4
    return -(-(hidden + shape.top_k * (weight + 4)) // 16) * 16


def _remote_rows(world: World, inner: str, shape: ExpertShape, counts: tuple[int, ...]) -> int:
    """Rows sent to other ranks or received from them, whichever is more."""
    if inner == "local":
        return 0
    if inner in ("allgather", "nccl-zero-cta"):
        return (world.size - 1) * max(counts)
    if inner in SLAB_TRANSPORTS:
        return max((world.size - 1) * counts[world.rank], sum(counts) - counts[world.rank])
    per_rank = shape.experts_per_rank(world.size)
    copies = torch.zeros(world.size, world.size, dtype=torch.int64)  # [from, to]
    for source, count in enumerate(counts):
        for ids in make_tokens(shape, count, seed=source).routes.ids_TK.tolist():
            for target in {number // per_rank for number in ids}:
                copies[source, target] += source != target
    return int(max(copies[world.rank].sum(), copies[:, world.rank].sum()))


def transports_of(size: int, kind: str = "cpu") -> list[str]:
    """Names of all transports that can run on `size` ranks of that kind of device."""
    if kind.startswith("generic:"):
        return ["allgather", "alltoall"]
    if kind == "cuda":
        return ["allgather", "alltoall", "copy-engine", "host-staged", "nccl-zero-cta", "one-sided"]
    names = [
        "allgather",
        "alltoall",
        "shared-memory",
        "simulated:allgather:10GB/s:10us",
        "simulated:alltoall:10GB/s:10us",
    ]
    return ["local", *names] if size == 1 else names
