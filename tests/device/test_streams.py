"""Streams as the runtime uses them, and a recording fake that checks happens-before."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest

from antiphon.core.errors import LaneError
from antiphon.device.cpu import CpuDevice
from antiphon.runtime import CpuStreams, Pending, current_lane, finish, run_lanes, switch
from tests.support.errors import raises


class RecordedStreams:
    """Streams as vector clocks: an event is what has happened before it on either stream."""

    owner = CpuDevice("cpu")

    def __init__(self) -> None:
        self.current = "compute"
        self.happened: dict[str, set[str]] = {"compute": set(), "comm": set()}
        self.log: list[str] = []

    def launch(self, work: str) -> None:
        self.happened[self.current].add(work)
        self.log.append(f"{self.current}: {work}")

    def record(self) -> frozenset[str]:
        return frozenset(self.happened[self.current])

    def wait(self, event: frozenset[str]) -> None:
        self.happened[self.current] |= event

    @contextmanager
    def comm(self, *, after: frozenset[str]):
        before, self.current = self.current, "comm"
        self.wait(after)
        try:
            yield
        finally:
            self.current = before

    def join(self) -> None:
        self.log.append("join")
        self.happened["compute"] |= self.happened["comm"]

    def leave_free(self, num_sms: int):
        return nullcontext()

    def on_compute_stream(self) -> bool:
        return self.current == "compute"

    def require(self, *works: str) -> None:
        missing = set(works) - self.happened[self.current]
        assert not missing, f"{missing} may not have happened on the {self.current} stream"


def exchange(streams: RecordedStreams, name: str) -> Pending[str]:
    """A communication as a transport sends it: early event, comm stream, wait in `finish`."""
    with streams.comm(after=streams.record()):
        streams.launch(f"{name} sent")
        arrived = streams.record()

    def wait() -> str:
        streams.wait(arrived)
        return name

    return Pending(wait, label=name)


def moe_layers(streams: RecordedStreams, num_layers: int) -> int:
    lane = current_lane()
    for layer in range(num_layers):
        tag = f"lane {lane} layer {layer}"
        streams.launch(f"{tag} attention")
        rows = finish(exchange(streams, f"{tag} dispatch"))
        streams.require(f"{rows} sent", f"{tag} attention")
        streams.launch(f"{tag} experts")
        back = finish(exchange(streams, f"{tag} combine"))
        streams.require(f"{back} sent", f"{tag} experts")
    return lane


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_a_run_joins_the_comm_stream_once_at_its_end(num_lanes):
    streams = RecordedStreams()
    assert run_lanes([partial(moe_layers, streams, 2)] * num_lanes, streams=streams) == list(range(num_lanes))
    assert streams.log.count("join") == 1
    assert streams.log[-1] == "join"


def test_work_that_nobody_waited_for_has_happened_after_the_run():
    """A reset of a flag, say: launched on the comm stream, without a pending."""
    streams = RecordedStreams()

    def body():
        with streams.comm(after=streams.record()):
            streams.launch("reset")

    run_lanes([body, switch], streams=streams)
    streams.require("reset")


def test_the_fake_finds_a_read_before_its_wait():
    streams = RecordedStreams()

    def body():
        sent = exchange(streams, "dispatch")
        switch()
        with pytest.raises(AssertionError, match="dispatch sent"):
            streams.require("dispatch sent")
        sent.wait()
        streams.require("dispatch sent")

    run_lanes([body, switch], streams=streams)


def test_the_other_lanes_compute_lies_between_send_and_wait():
    """The overlap itself: while lane 0's dispatch is under way, lane 1's attention is queued."""
    streams = RecordedStreams()
    run_lanes([partial(moe_layers, streams, 1)] * 2, streams=streams)
    compute = [entry for entry in streams.log if entry.startswith("compute")]
    assert compute == [
        "compute: lane 0 layer 0 attention",
        "compute: lane 1 layer 0 attention",
        "compute: lane 0 layer 0 experts",
        "compute: lane 1 layer 0 experts",
    ]
    sent = streams.log.index("comm: lane 0 layer 0 dispatch sent")
    assert streams.log[sent + 1] == "compute: lane 1 layer 0 attention"


def test_a_wait_for_one_lane_does_not_order_the_compute_after_the_other_lanes_send():
    streams = RecordedStreams()
    seen = []

    def first():
        finish(exchange(streams, "first"))
        seen.append(sorted(streams.record()))

    def second():
        finish(exchange(streams, "second"))
        seen.append(sorted(streams.record()))

    run_lanes([first, second], streams=streams)
    assert seen == [["first sent"], ["first sent", "second sent"]]


@pytest.mark.parametrize("lane", [0, 1])
def test_a_switch_away_from_the_compute_stream_is_an_error(lane):
    streams = RecordedStreams()

    def astray():
        with streams.comm(after=streams.record()):
            switch("dispatch")

    functions = [switch, switch]
    functions[lane] = astray
    with raises(LaneError, f"lane {lane} ", "'dispatch'", "stream", remedy="stream"):
        run_lanes(functions, streams=streams)
    assert streams.on_compute_stream()


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_an_end_away_from_the_compute_stream_is_an_error(num_lanes):
    streams = RecordedStreams()

    def astray():
        streams.current = "comm"

    with raises(LaneError, "lane 0 ", remedy="stream"):
        run_lanes([astray] + [switch] * (num_lanes - 1), streams=streams)


def test_launching_on_the_comm_stream_between_switches_is_fine():
    streams = RecordedStreams()

    def body():
        with streams.comm(after=streams.record()):
            streams.launch("copy")
        switch()
        return streams.on_compute_stream()

    assert run_lanes([body, body], streams=streams) == [True, True]


def test_cpu_streams_order_everything_by_the_calling_thread():
    streams = CpuStreams()
    assert streams.on_compute_stream()
    with streams.comm(after=streams.record()):
        event = streams.record()
        assert streams.on_compute_stream()
    streams.wait(event)
    streams.join()


def test_cpu_streams_refuse_an_event_of_another_device():
    with pytest.raises(AssertionError, match="CpuStreams"):
        CpuStreams().wait(object())
