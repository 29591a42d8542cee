"""Captured steps without a device: what is queued while streams capture is a graph, and its replays run in any order.

The transports are the shipped code over the driver of `protocol_checks`, which moves nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from antiphon.comm import OptionError, RankGroup, Routes, Transport, load_transport
from antiphon.comm.collective import nccl
from antiphon.comm.collective.allgather import PaddedExchange, QueuedAllGatherTransport
from antiphon.comm.local import LocalTransport
from antiphon.comm.registry import TransportSpec
from antiphon.comm.row_format import LaneBuffers
from antiphon.comm.simulated import SimulatedTransport
from tests.comm.protocol_checks import (
    FIRST_HANDLE,
    FakeGroup,
    FakeStreams,
    Layers,
    ProtocolWorld,
    protocol_world,
    run_layers,
)
from tests.comm.world import make_shape
from tests.support.captured import Graph, finishes
from tests.support.happens_before import check
from tests.support.protocol_log import Action, LoggedMailbox

MEDIA = (
    "copy-engine",
    "host-staged",
    "host-staged by kernel",
    "host-staged by kernel and copies",
    "one-sided",
    "one-sided and copy-engine",
)
NUM_ORDERS = 400
NUM_LAYERS = 3


def padded(size: int, num_lanes: int, num_tokens: int, num_layers: int = NUM_LAYERS) -> Layers:
    """The layers of a padded step: the same number of tokens on every rank."""
    return [[[num_tokens] * size] * num_layers] * num_lanes


def changing(size: int, num_lanes: int, *, seed: int) -> Layers:
    sizes = random.Random(seed)
    return [[[sizes.choice([0, 1, 9, 40]) for _ in range(size)] for _ in range(4)] for _ in range(num_lanes)]


@contextmanager
def world_of(name: str, *, size: int, num_lanes: int) -> Iterator[ProtocolWorld]:
    """The ranks of a medium. Where it is two, combines of 12 tokens go by kernel, and the larger dispatches do not."""
    put_bytes = 1 << 20 if "kernel" in name else None
    with protocol_world(name.partition(" ")[0], size=size, num_lanes=num_lanes, put_bytes=put_bytes) as world:
        if "and" in name:
            for mailbox in mailboxes(world):
                mailbox.put_bytes = size * 12 * 70
        yield world


def mailboxes(world: ProtocolWorld) -> list[Any]:
    return [cast("LoggedMailbox", transport.mailbox).inner for transport in world.transports]


def num_finished(graphs: list[Graph], *, num_replays: int = 2) -> int:
    """How many of the orders end in which CUDA may run the replays of all ranks."""
    choice = random.Random(12)
    return sum(
        finishes([[e for _ in range(num_replays) for e in graph.legal_order(choice)] for graph in graphs])
        for _ in range(NUM_ORDERS)
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("name", MEDIA)
def test_replays_end_in_any_legal_order(name: str, num_lanes: int, size: int) -> None:
    with world_of(name, size=size, num_lanes=num_lanes) as world:
        graphs = world.capture(padded(size, num_lanes, 12, num_layers=2))
    engines = {"up", "down"} if "host" in name else {"comm"}
    programs = {"senders", "receivers"} if "host" in name else set()  # those of `one-sided` are the compute stream's
    one_lane = {"host-staged by kernel": programs, "one-sided": programs}.get(name, engines)
    if name == "host-staged by kernel and copies":
        one_lane = engines | programs
    streams = one_lane if num_lanes == 1 else engines
    assert {event.stream for event in graphs[0].events} == {"compute", *streams}
    if name == "host-staged":
        assert any("flag 2 " in event.place for event in graphs[0].events), "no slab went in several chunks"
    assert num_finished(graphs) == NUM_ORDERS


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("name", MEDIA)
def test_replays_are_clean_between_eager_steps_of_other_sizes(name: str, num_lanes: int) -> None:
    size = 3
    with world_of(name, size=size, num_lanes=num_lanes) as world:
        world.run(changing(size, num_lanes, seed=1))
        small, large = (world.capture(padded(size, num_lanes, num_tokens)) for num_tokens in (8, 40))
        for graphs in (small, small, large):
            world.replay(graphs)
        world.run(changing(size, num_lanes, seed=2))
        world.replay(small)
        logs = world.logs()
        epochs = [cast("FakeGroup", transport.group).epochs for transport in world.transports]
    assert check(logs) == []
    rounds = {event.round for log in logs for event in log if event.action is Action.SET}
    assert rounds == set(range(1, 2 * 4 + 4 * NUM_LAYERS + 1))
    assert epochs == [[FIRST_HANDLE] * 4] * size, "a replay was not preceded by an epoch on the compute stream"


def wait_before_the_own_signal(world: ProtocolWorld) -> None:
    """Leave out the event between this rank's own signal and its wait."""
    for mailbox in mailboxes(world):
        kind = _WaitsForNothing if world.transports[0].name == "copy-engine" else _DownloadsAtOnce
        mailbox.streams = kind(mailbox.streams)


def only_the_first_chunk_in_order(world: ProtocolWorld) -> None:
    for mailbox in mailboxes(world):

        def download(exchange: Any, stream: int, signaled: Any = (), inner: Any = mailbox._download) -> None:
            inner(exchange, stream, signaled[:1])

        mailbox._download = download


class _Changed:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _WaitsForNothing(_Changed):
    def wait(self, event: Any) -> None:
        pass


class _DownloadsAtOnce(_Changed):
    def queue_on(self, name: str, *, after: Any = None) -> int:
        handle: int = self._inner.queue_on(name, after=None if name == "down" else after)
        return handle


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("copy-engine", wait_before_the_own_signal),
        ("host-staged", wait_before_the_own_signal),
        ("host-staged", only_the_first_chunk_in_order),
    ],
)
def test_without_the_event_some_replays_hang(name: str, change: Callable[[Any], None], num_lanes: int) -> None:
    with protocol_world(name, size=2, num_lanes=num_lanes) as world:
        change(world)
        graphs = world.capture(padded(2, num_lanes, 12, num_layers=2))
    assert num_finished(graphs) < NUM_ORDERS


def test_a_capture_contains_no_replay_of_a_medium() -> None:
    """A third use of slabs in several chunks would be captured by the medium itself."""
    with protocol_world("host-staged", size=2, num_lanes=1, recorded=False) as world:
        transport = world.transports[0]
        layers = padded(2, 1, 40)
        run_layers(transport, layers)
        captures, replays = world.driver.num_captures, world.driver.num_replays
        assert captures > 0 and replays > 0, "the sizes are too small for a replay"
        before = len(world.driver.calls)
        with cast("FakeStreams", transport.streams).captures():
            run_layers(transport, layers)
        assert (world.driver.num_captures, world.driver.num_replays) == (captures, replays)
        assert len([call for call in world.driver.calls[before:] if call[0] == "copy"]) > 4 * NUM_LAYERS
        run_layers(transport, layers)
        assert world.driver.num_replays > replays


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["copy-engine", "host-staged"])
def test_captures_of_one_size_are_the_same_calls(name: str, size: int) -> None:
    """Also what they tell the device watch, with one code an exchange; the codes of eager steps are all different."""
    with protocol_world(name, size=size, num_lanes=1, recorded=False) as world:
        transport, calls = world.transports[size - 1], world.driver.calls
        captures = []
        for num_tokens in (12, 40, 12):
            begin = len(calls)
            with cast("FakeStreams", transport.streams).captures():
                run_layers(transport, padded(size, 1, num_tokens))
            captures.append(calls[begin:])
            run_layers(transport, changing(size, 1, seed=num_tokens))
    assert captures[0] == captures[2] != captures[1]
    told = [[call[2] for call in calls if world.is_watch_word(call[1])] for calls in captures]
    assert told[0] == told[1], "the sizes share the codes of their labels"
    assert len(set(told[0][::2])) == 2 * NUM_LAYERS and set(told[0][1::2]) == {0}
    eager = [call[2] for call in calls if world.is_watch_word(call[1]) and call[2] and call[2] not in told[0]]
    assert len(eager) == len(set(eager)) >= 3 * 2 * 4


# ---- what is said and refused


class Own(LocalTransport):
    """A user's class, which inherits from one that can be captured."""


SAID = {
    "local": "",
    "one-sided": "",
    "copy-engine": "",
    "host-staged": "",
    "allgather": "",
    "alltoall": "reads the counts",
    "shared-memory": "host itself copies",
    "nccl-zero-cta": "baseline",
}


@pytest.mark.parametrize("name", SAID)
def test_every_transport_says_whether_it_can_be_captured(name: str) -> None:
    with protocol_world("copy-engine", size=2, num_lanes=1):  # where the driver can be imported
        said = load_transport(TransportSpec(name=name), "cuda").capture_obstacle
    assert said == SAID[name] if SAID[name] == "" else SAID[name] in said


def test_other_classes_cannot_be_captured_unless_they_say_so() -> None:
    assert "simulated link" in SimulatedTransport.capture_obstacle
    assert "moves the rows" in load_transport(TransportSpec(name="allgather"), "cpu").capture_obstacle
    assert "does not say" in Transport.capture_obstacle
    assert "does not say" in Own.capture_obstacle
    assert LocalTransport.capture_obstacle == ""


def dispatch(transport: Transport, counts: tuple[int, ...] | None) -> None:
    shape, num_tokens = transport.shape, 3
    ids_TK = torch.arange(shape.top_k).repeat(num_tokens, 1)
    routes = Routes(ids_TK, torch.ones(ids_TK.shape, dtype=shape.weight_dtype))
    transport.dispatch(torch.zeros(num_tokens, shape.hidden_size, dtype=shape.dtype), routes, tokens_by_rank=counts)


@pytest.mark.parametrize("counts", [None, (3, 4)], ids=str)
def test_a_capture_needs_one_size_on_all_ranks(counts: tuple[int, ...] | None) -> None:
    with protocol_world("copy-engine", size=2, num_lanes=1) as world:
        transport = world.transports[0]
        with cast("FakeStreams", transport.streams).captures(), pytest.raises(OptionError, match="pad all ranks"):
            dispatch(transport, counts)
        dispatch(transport, (3, 4))  # eagerly, and nothing is left of the attempt


def test_a_capture_of_what_cannot_be_captured_says_why() -> None:
    streams = FakeStreams()
    group = RankGroup(rank=0, size=1)
    with streams.captures():
        dispatch(LocalTransport(make_shape(), group=group, streams=streams, num_lanes=1), (3,))
        with pytest.raises(OptionError, match="does not say that it can be captured"):
            dispatch(Own(make_shape(), group=group, streams=streams, num_lanes=1), (3,))


def test_frozen_buffers_do_not_grow() -> None:
    buffers = LaneBuffers(torch.device("cpu"))
    first = buffers.get("rows", 8, 4, torch.float32)
    buffers.freeze()
    assert buffers.get("rows", 8, 4, torch.float32).data_ptr() == first.data_ptr()
    for name, num_rows in (("rows", 9), ("home", 1)):
        with pytest.raises(OptionError, match="captured steps hold its address"):
            buffers.get(name, num_rows, 4, torch.float32)
    assert buffers.get("rows", 5, 4, torch.float32).data_ptr() == first.data_ptr()


# ---- allgather over NCCL


def test_allgather_freezes_what_is_large_enough_for_every_step() -> None:
    transport = QueuedAllGatherTransport(
        make_shape(), group=FakeGroup(0, 2), streams=FakeStreams(), num_lanes=2, max_tokens=16
    )
    transport.freeze()

    def buffers_of(num_tokens: int) -> list[int]:
        exchange = PaddedExchange(lane=1, num_tokens=num_tokens, padded=num_tokens)
        buffers = transport._packed(exchange), transport._gathered(exchange), transport.partials_of(exchange)
        return [buffer.data_ptr() for buffer in buffers]

    assert buffers_of(16) == buffers_of(1) == buffers_of(9)
    with pytest.raises(OptionError, match="captured steps hold its address"):
        buffers_of(17)


def test_nccl_tells_the_watch_constants_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[tuple[int, int]] = []  # the code, and the stream

    class Operations:
        """Stands in for `StreamOperations`."""

        value = 0

        def __init__(self, *, flush: bool) -> None:
            pass

        def write(self, address: int, value: int) -> int:
            return 0

        def set_value(self, number: int, value: int) -> None:
            self.value = value

        def queue(self, stream: int) -> None:
            queued.append((self.value, stream))

    monkeypatch.setattr(nccl, "StreamOperations", Operations)
    monkeypatch.setattr(nccl.NcclGroup, "_open", lambda self: None)
    monkeypatch.setattr(nccl.NcclGroup, "_current", lambda self: 55)
    group, streams, calls = FakeGroup(0, 2), FakeStreams(), []
    link = nccl.NcclGroup(group, streams)

    def collective(out: str, mine: str, **options: Any) -> None:
        queued.append((-1, 0))
        calls.append((out, mine, options))

    def codes() -> list[int]:
        queued.clear()
        for label in ("dispatch layer 0", "combine layer 0"):
            link._queue(label, "all-gather", collective, "out", "mine")
        assert [code == -1 for code, _ in queued] == [False, True, False] * 2, "the watch is told before and after"
        assert {stream for code, stream in queued if code != -1} == {55}
        assert [code for code, _ in queued[2::3]] == [0, 0]
        return [code for code, _ in queued[::3]]

    eager = codes() + codes()
    with streams.captures():
        captured = [codes(), codes()]
    assert len(set(eager)) == 4
    assert captured[0] == captured[1] and len(set(captured[0])) == 2 and not set(captured[0]) & set(eager)
    assert all("async_op" not in options for _, _, options in calls), "torch would watch the collective from a thread"
    link.before_replay()
    assert group.epochs == [55]
