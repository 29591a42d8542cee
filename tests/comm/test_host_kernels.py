"""The kernels of `host-staged` without a device: the places they get, and that the checker finds broken ones.

The kernels themselves are tested in `tests/kernels/test_host_exchange.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch

from antiphon.comm.slab.host_kernels import LaunchedHostKernels
from antiphon.comm.slab.mailbox import Exchange, Phase
from tests.comm.protocol_checks import NUM_EPOCHS, protocol_world, run_layers
from tests.support.happens_before import check
from tests.support.kernel_log import LoggedHostKernels
from tests.support.protocol_log import LoggedMailbox

pytest.importorskip("triton")


@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("phase", Phase)
def test_the_kernel_gets_the_places_of_every_slab_and_flag(phase: Phase, lane: int) -> None:
    """Its arithmetic over ranks must come to the places that copies would have been given."""
    given: list[dict[str, Any]] = []

    def keep(
        source: torch.Tensor, box: torch.Tensor, bases_W: torch.Tensor, *counters: torch.Tensor, **places: Any
    ) -> None:
        counts = [counter.data_ptr() for counter in counters]
        assert [tuple(counter.shape) for counter in counters] == [(3, 1024)] * 2 and not any(map(torch.any, counters))
        given.append({"source": source, "box": box, "bases": bases_W.tolist(), "counts": counts, **places})

    with protocol_world("host-staged", size=4, num_lanes=2, recorded=False, put_bytes=1 << 20) as world:
        for transport in world.transports:
            mailbox: Any = transport.mailbox
            run_layers(transport, [[[5] * 4]] * 2)
            rank, device = transport.group.rank, torch.device("cpu")
            layout = transport.exchanges[lane]
            assert layout is not None
            exchange = layout.dispatch if phase is Phase.DISPATCH else layout.combine
            mailbox.kernels = LaunchedHostKernels(mailbox._bases, device, rank=rank, num_lanes=2, word=8)
            with patch("antiphon.kernels.fused.host_exchange.exchange_slabs", keep):
                mailbox.put(exchange)
                mailbox.wait(exchange)
                mailbox.put(layout.combine if phase is Phase.DISPATCH else layout.dispatch)
            call, other_phase = given
            given.clear()
            assert not set(call["counts"]) & set(other_phase["counts"]) and len(set(call["counts"])) == 2
            first, num_bytes = call["first"], call["num_bytes"]
            assert first == min(put.peer for put in exchange.puts) and call["rank"] == rank
            assert call["same_source"] == exchange.same_source == (phase is Phase.DISPATCH)
            for put in exchange.puts:
                source_step = 0 if call["same_source"] else num_bytes
                assert call["source"].data_ptr() + (put.peer - first) * source_step == put.source.data_ptr()
                held = call["bases"][rank] + call["target"] + put.peer * call["target_step"]
                assert held == mailbox._slab_at(rank, lane, phase, put.peer)
                assert put.source.numel() == num_bytes
            for arrival in exchange.arrivals:
                into = call["box"].data_ptr() + (arrival.peer - first) * num_bytes
                assert into == mailbox.box(lane, phase).data_ptr() + arrival.offset
                assert arrival.num_bytes == num_bytes
            way = lane * 2 + phase
            assert call["flag"] == mailbox._epochs_start + 4 * way * 4 * NUM_EPOCHS
            assert call["flag"] + 4 * 4 * NUM_EPOCHS <= mailbox._lane_starts[0]
            assert (call["word"], call["code"] % 64) == (8, 0) and call["code"] > 0


def leave_out(method: str) -> Callable[[Any], None]:
    def change(kernels: Any) -> None:
        setattr(kernels, method, lambda *arguments, **places: None)

    return change


def do_not_wait(kernels: Any) -> None:
    """Receivers that download at once."""
    kernels.flag_seen = lambda *arguments: None


def flags_first(kernels: Any) -> None:
    """Senders that flag a slice before they have uploaded it."""
    kernels.flag_first = True


def no_flags_in_combine(kernels: Any) -> None:
    """Then nothing says that the peers have read the outgoing slab of the dispatch."""

    def only_in_dispatch(inner: Callable[..., None]) -> Callable[..., None]:
        def call(exchange: Exchange, *rest: int) -> None:
            if exchange.phase is Phase.DISPATCH:
                inner(exchange, *rest)

        return call

    kernels.flag_seen = only_in_dispatch(kernels.flag_seen)
    kernels.set_flags = only_in_dispatch(kernels.set_flags)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (leave_out("send"), "waits forever: nobody sets it"),
        (leave_out("receive"), "not what this round brought"),
        (do_not_wait, "in no order"),
        (flags_first, "in no order"),
        (no_flags_in_combine, "outgoing dispatch slab of rank"),
    ],
)
def test_broken_kernels_are_found(change: Callable[[Any], None], found: str) -> None:
    with protocol_world("host-staged", size=3, num_lanes=2, put_bytes=1 << 20) as world:
        for transport in world.transports:
            kernels = cast("Any", cast("LoggedMailbox", transport.mailbox).inner).kernels
            assert isinstance(kernels, LoggedHostKernels)
            change(kernels)
        world.run([[[40, 40, 40]] * 3])
        problems = check(world.logs())
    assert any(found in problem for problem in problems), problems[:3]


def test_slabs_go_in_several_slices_and_large_ones_by_copy_engine() -> None:
    with protocol_world("host-staged", size=2, num_lanes=1, put_bytes=1 << 30) as world:
        world.run([[[40, 40], [6, 6]]])
        flags = {event.place for event in world.logs()[0] if event.stream == "senders"}
        assert {
            "dispatch flag 8 from rank 0 at rank 1, lane 0",
            "dispatch flag 9 from rank 0 at rank 1, lane 0",
        } <= flags
        mailbox = cast("Any", cast("LoggedMailbox", world.transports[0].mailbox).inner)
        layout = world.transports[0].exchanges[0]
        assert layout is not None
        exchange = layout.dispatch
        assert mailbox.largest_slab == 8 << 20
        for slab_bytes, goes in ((8 << 20, True), ((8 << 20) + 16, False)):
            exchange.slab_bytes = slab_bytes
            assert mailbox.goes_by_kernel(exchange) == goes
