"""How other programs may use the library. Runs on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from antiphon.comm import RankGroup, Transport, create_transport
from antiphon.core.errors import AntiphonError
from antiphon.runtime import CpuStreams, finish, run_lanes, switch
from tests.comm.world import MAX_TOKENS, Tokens, apply_experts, make_shape, make_tokens, reference
from tests.support.ranks import Meeting

__all__ = ["TRANSPORTS", "be_a_program"]

TRANSPORTS = ("alltoall", "allgather", "shared-memory")
SHAPE = make_shape(torch.float32, hidden_size=32)
NUM_TOKENS = 5


def be_a_program(meeting: Meeting) -> dict[str, str]:
    """The error of each misuse with its fields ("" if there is none), by name."""
    dist.init_process_group("gloo", init_method=meeting.init_method("mine"), rank=meeting.rank, world_size=meeting.size)
    said = {"connect": _error(lambda: RankGroup.connect(rank=meeting.rank, size=2, init_method="env://"))}
    group = RankGroup(rank=meeting.rank, size=meeting.size, process_group=dist.group.WORLD, timeout_s=20)
    for name in TRANSPORTS:
        for what, found in _use(name, group).items():
            said[f"{name}: {what}"] = found
    group.close()
    said["closed"] = _error(lambda: group.all_gather_object(1))
    said["destroyed"] = "" if dist.is_initialized() else "the group of the program is gone"
    dist.destroy_process_group()
    return said


def _use(name: str, group: RankGroup) -> dict[str, str]:
    transport = create_transport(name, SHAPE, group=group, streams=CpuStreams(), num_lanes=2, max_tokens=MAX_TOKENS)
    tokens = make_tokens(SHAPE, NUM_TOKENS, seed=group.rank)
    x_TD, routes = tokens.x_TD, tokens.routes
    said = {"plain": _run(transport, tokens, group, None)}
    for what, counts in {
        "length": (NUM_TOKENS,),
        "own": (NUM_TOKENS + 1,) * 2,
        "most": tuple(NUM_TOKENS if rank == group.rank else MAX_TOKENS + 1 for rank in range(2)),
    }.items():
        said[f"counts, {what}"] = _error(partial(transport.dispatch, x_TD, routes, tokens_by_rank=counts))
    counts_list: Any = [NUM_TOKENS] * 2
    said["counts, list"] = _run(transport, tokens, group, counts_list)
    said["meta ids"] = _error(
        lambda: transport.dispatch(x_TD, type(routes)(routes.ids_TK.to("meta"), routes.weights_TK))
    )
    said["gradient"] = _error(lambda: transport.dispatch(x_TD.clone().requires_grad_(), routes))
    said["gradient of sums"] = _with_gradient(transport, tokens, group)
    torch.set_default_device("meta")
    try:
        said["default device"] = _run(transport, tokens, group, None)
    finally:
        torch.set_default_device(None)
    said["lanes"] = _lanes_differ(transport, group)
    return said


def _run(transport: Transport, tokens: Tokens, group: RankGroup, counts: tuple[int, ...] | None) -> str:
    rows = finish(transport.dispatch(tokens.x_TD, tokens.routes, tokens_by_rank=counts))
    with torch.device("cpu"):
        partial_RD = apply_experts(rows, SHAPE, group)
    sums_TD = finish(transport.combine(partial_RD))
    with torch.device("cpu"):
        expected_TD, _ = reference(tokens)
        return "" if torch.allclose(sums_TD.double(), expected_TD, atol=1e-3) else "the sums are wrong"


def _with_gradient(transport: Transport, tokens: Tokens, group: RankGroup) -> str:
    rows = finish(transport.dispatch(tokens.x_TD, tokens.routes))
    partial_RD = apply_experts(rows, SHAPE, group)
    said = _error(lambda: transport.combine(partial_RD.clone().requires_grad_()))
    finish(transport.combine(partial_RD))
    return said


def _lanes_differ(transport: Transport, group: RankGroup) -> str:
    """Lane 0 of rank 1 switches once before it sends, so that lane 1 comes first on that rank."""

    def lane(index: int) -> Callable[[], Any]:
        def send() -> Any:
            if (group.rank, index) == (1, 0):
                switch()
            tokens = make_tokens(SHAPE, NUM_TOKENS + index, seed=group.rank)
            return finish(transport.dispatch(tokens.x_TD, tokens.routes))

        return send

    said = _error(lambda: run_lanes([lane(0), lane(1)]))
    transport.reset()
    return said


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except AntiphonError as error:
        return f"{type(error).__name__} {error.option}={error.value}: {error}"
    return ""
