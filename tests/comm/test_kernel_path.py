"""Exchanges by kernel without a device: which ones go that way, and their order among those of copy engines.

`test_one_sided` and `test_host_kernels` check the places that the kernels get.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch

from antiphon.comm.slab.mailbox import Arrival, Exchange, Phase, Put
from antiphon.runtime import run_lanes
from tests.comm.protocol_checks import ProtocolWorld, protocol_world, run_layers
from tests.support.happens_before import check
from tests.support.protocol_log import LoggedMailbox

NAMES = ("one-sided", "host-staged")
BY_KERNEL = {"one-sided": {"compute"}, "host-staged": {"senders"}}
BY_ENGINE = {"one-sided": {"comm"}, "host-staged": {"up"}}


def puts_of(world: ProtocolWorld, begin: int = 0) -> list[tuple[int, int, str]]:
    """The round, phase and stream of every put of the first rank."""
    events = world.logs()[0][begin:]
    found = [(event.round, event.phase, event.stream) for event in events if event.operation in ("put", "upload")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", NAMES)
def test_a_split_step_leaves_small_exchanges_to_copy_engines(name: str) -> None:
    """The same layout is used by one lane, by two, and by one again."""
    layers = [[[6, 6, 6]] * 2]
    with protocol_world(name, size=3, num_lanes=2, put_bytes=1 << 20) as world:
        streams = []
        for lanes in (layers, layers * 2, layers):
            begin = len(world.logs()[0])
            world.run(lanes)
            streams.append({stream for _, _, stream in puts_of(world, begin)})
        logs = world.logs()
    assert streams == [BY_KERNEL[name], BY_ENGINE[name], BY_KERNEL[name]]
    assert check(logs) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_exchange_ends_the_way_it_began(name: str) -> None:
    """A wait outside the lanes in which the put was made must be of the same kind."""
    with protocol_world(name, size=2, num_lanes=1, recorded=False, put_bytes=1 << 20) as world:
        transport = world.transports[0]
        run_layers(transport, [[[6, 6]]])
        mailbox: Any = transport.mailbox
        layout = transport.exchanges[0]
        assert layout is not None
        calls = world.driver.calls
        mailbox.put(layout.dispatch)
        begin = len(calls)
        run_lanes([lambda: mailbox.signal(layout.dispatch), lambda: mailbox.wait(layout.dispatch)])
        assert len(calls) == begin
        run_lanes([lambda: mailbox.put(layout.dispatch), lambda: None])
        begin = len(calls)
        mailbox.signal(layout.dispatch)
        assert len(calls) > begin


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_kernels_and_copies_in_turn_are_clean(name: str, size: int) -> None:
    """Rows are 80 bytes and sums 64, so exchanges of 20 tokens are at the limit, and combines of 24."""
    counts = [[n] * size for n in (6, 40, 20, 21, 24, 1, 64)] + [[0, 9, 3, 1][:size], [6] * size]
    with protocol_world(name, size=size, num_lanes=2, put_bytes=20 * size * 80) as world:
        world.run([counts])
        first_run = {(number, phase): stream for number, phase, stream in puts_of(world)}
        world.run([counts[::-1]])
        world.run([counts, counts[::-1]])
        logs = world.logs()
    assert check(logs) == []
    by_kernel = {way for way, stream in first_run.items() if {stream} == BY_KERNEL[name]}
    small, small_sums = {1, 3, 6, 9}, {1, 3, 4, 5, 6, 9}
    assert by_kernel == {(number, 0) for number in small} | {(number, 1) for number in small_sums}
    assert {stream for way, stream in first_run.items() if way not in by_kernel} == BY_ENGINE[name]


@pytest.mark.parametrize("name", NAMES)
def test_without_triton_everything_goes_by_copy_engines(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "antiphon.comm"),
        protocol_world(name, size=2, num_lanes=1, put_bytes=1 << 20) as world,
    ):
        module = import_module("antiphon.comm.slab.kernel_path")
        for transport in world.transports:
            mailbox: Any = cast("LoggedMailbox", transport.mailbox).inner
            mailbox.put_bytes = 0
            with patch.object(module, "find_spec", lambda module: None):
                mailbox.use_kernels(1 << 20)
        world.run([[[6, 6]] * 2])
        assert {stream for _, _, stream in puts_of(world)} == BY_ENGINE[name]
    assert "no Triton" in caplog.text


def test_equal_slabs_have_a_size_and_others_none() -> None:
    def exchange(sent: list[int], received: list[int]) -> Exchange:
        puts = tuple(Put(peer, torch.empty(size, dtype=torch.uint8), 0) for peer, size in enumerate(sent))
        arrivals = tuple(Arrival(peer, 0, size) for peer, size in enumerate(received))
        return Exchange(lane=0, phase=Phase.DISPATCH, puts=puts, arrivals=arrivals, same_source=True)

    assert exchange([16, 16], [16, 16]).slab_bytes == 16
    assert exchange([16, 16], [16, 32]).slab_bytes == exchange([16, 32], [16, 16]).slab_bytes == 0
    assert exchange([0], [0]).slab_bytes == exchange([], []).slab_bytes == 0
