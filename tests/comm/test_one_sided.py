"""`one-sided` without a device: which exchanges go by kernel, where it puts slabs, and that broken ones are found.

Order and graphs are checked in `test_captured_steps`, the kernels themselves in `tests/kernels/test_put.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch

from antiphon.comm.slab.mailbox import Exchange, Phase
from tests.comm.protocol_checks import ProtocolWorld, protocol_world, run_layers
from tests.comm.world import make_shape
from tests.support.happens_before import check
from tests.support.protocol_log import LoggedMailbox

pytest.importorskip("triton")


def exchanges_of(world: ProtocolWorld, counts: tuple[int, ...]) -> list[tuple[Exchange, Exchange]]:
    """The dispatch and the combine of every rank."""
    for transport in world.transports:
        run_layers(transport, [[counts]])
    layouts = [transport.exchanges[0] for transport in world.transports]
    assert all(layout is not None for layout in layouts)
    return [(layout.dispatch, layout.combine) for layout in layouts if layout is not None]


@pytest.mark.parametrize(
    ("counts", "put_bytes", "expected"),
    [
        ((4, 4, 4), 4 * 3 * 80, (True, True)),
        ((4, 4, 4), 4 * 3 * 80 - 1, (False, True)),
        ((4, 4, 4), 4 * 3 * 64 - 1, (False, False)),
        ((4, 4, 3), 1 << 20, (False, False)),
        ((0, 4, 4), 1 << 20, (False, False)),
        ((0, 0, 0), 1 << 20, (False, False)),
    ],
    ids=str,
)
def test_small_even_exchanges_go_by_kernel_on_all_ranks(
    counts: tuple[int, ...], put_bytes: int, expected: tuple[bool, bool]
) -> None:
    """Rows of 16 float32 numbers are 64 bytes, and 80 with two weights and two ids."""
    with protocol_world("one-sided", size=3, num_lanes=1, recorded=False) as world:
        for transport in world.transports:
            cast("Any", transport.mailbox).put_bytes = put_bytes
        found = [
            tuple(cast("Any", transport.mailbox).goes_by_kernel(exchange) for exchange in both)
            for transport, both in zip(world.transports, exchanges_of(world, counts), strict=True)
        ]
    assert found == [expected] * 3


def test_slabs_that_are_not_aligned_go_by_copy_engine() -> None:
    shape = make_shape(torch.float32, num_experts=6, top_k=2, hidden_size=5)  # sums of 20 bytes, rows of 48
    with protocol_world("one-sided", size=2, num_lanes=1, recorded=False, shape=shape) as world:
        both = exchanges_of(world, (3, 3))[0]
        assert [cast("Any", world.transports[0].mailbox).goes_by_kernel(exchange) for exchange in both] == [True, False]


@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("phase", Phase)
def test_the_kernel_gets_the_places_of_every_put_and_flag(phase: Phase, lane: int) -> None:
    """Its arithmetic over ranks must come to the addresses that copies would have been given."""
    given: list[dict[str, Any]] = []
    waits: list[tuple[Any, ...]] = []

    def keep(source: torch.Tensor, bases_W: torch.Tensor, *counters: torch.Tensor, **places: Any) -> None:
        given.append({"source": source.data_ptr(), "bases": bases_W.tolist(), "counters": counters, **places})

    with protocol_world("one-sided", size=4, num_lanes=2, recorded=False) as world:
        for transport in world.transports:
            mailbox: Any = transport.mailbox
            run_layers(transport, [[[5] * 4]] * 2)
            rank, flags = transport.group.rank, mailbox._memory[mailbox._set_bytes : 2 * mailbox._set_bytes]
            module = import_module("antiphon.comm.slab.one_sided")
            layout = transport.exchanges[lane]
            assert layout is not None
            exchange = layout.dispatch if phase is Phase.DISPATCH else layout.combine
            mailbox.puts = module.PutKernels(mailbox._bases, flags.view(torch.int32), rank=rank, num_lanes=2, word=8)
            with patch("antiphon.kernels.fused.put.put_slabs", keep):
                mailbox.put(exchange)
            call = given.pop()
            offset = mailbox._offsets[lane][phase]
            found = {
                (
                    peer,
                    call["source"] + (peer - call["first"]) * call["step_bytes"],
                    call["bases"][peer] + call["target"],
                    call["num_bytes"],
                )
                for peer in set(range(4)) - {rank}
            }
            assert found == {
                (put.peer, put.source.data_ptr(), mailbox._bases[put.peer] + offset + put.offset, put.source.numel())
                for put in exchange.puts
            }
            with patch("antiphon.kernels.fused.put.wait_for_slabs", lambda *all, **_: waits.append(all)):
                for other in world.transports:
                    other_box: Any = other.mailbox
                    if other is not transport:
                        flag_at_peer = other_box._bases[other.group.rank] + call["flag"]
                        mine = other_box._memory[other_box._set_bytes :]
                        place = (lane * 2 + phase) * 4 + rank
                        assert flag_at_peer == mine.data_ptr() + 4 * place
                mailbox.puts.wait(exchange, 64)
            flags_W, epoch = waits.pop()
            assert flags_W.data_ptr() == flags.data_ptr() + 4 * 4 * (lane * 2 + phase) and flags_W.shape == (4,)
            assert epoch.data_ptr() == call["counters"][1].data_ptr() != call["counters"][0].data_ptr()


def leave_out(method: str) -> Callable[[Any], None]:
    def change(mailbox: Any) -> None:
        setattr(mailbox.puts, method, lambda *arguments: None)

    return change


@pytest.mark.parametrize(
    ("broken", "found"),
    [("wait", "not what this round brought"), ("put", "waits forever: nobody sets it")],
)
def test_broken_kernels_are_found(broken: str, found: str) -> None:
    with protocol_world("one-sided", size=3, num_lanes=2) as world:
        for transport in world.transports:
            leave_out(broken)(cast("LoggedMailbox", transport.mailbox).inner)
        world.run([[[6, 6, 6]] * 3])
        problems = check(world.logs())
    assert any(found in problem for problem in problems), problems


def test_small_and_large_exchanges_in_turn_are_clean() -> None:
    with protocol_world("one-sided", size=3, num_lanes=2) as world:
        for transport in world.transports:
            cast("Any", cast("LoggedMailbox", transport.mailbox).inner).put_bytes = 20 * 3 * 80
        world.run([[[6, 6, 6], [40, 40, 40], [9, 0, 9], [20, 20, 20], [21, 21, 21], [1, 1, 1]]])
        logs = world.logs()
    assert check(logs) == []
    put_by = {event.stream for event in logs[0] if event.operation == "put"}
    assert put_by == {"compute", "comm"}
