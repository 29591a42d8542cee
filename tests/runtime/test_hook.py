"""Which events a recorder receives, and what happens when it fails."""

import logging
from types import SimpleNamespace

import pytest

import antiphon.runtime.hook as hook_module
from antiphon.core.errors import LaneError
from antiphon.runtime import EventKind, LaneEvent, Pending, finish, run_lanes, switch

START, END = EventKind.START, EventKind.END
OUT, IN = EventKind.SWITCH_OUT, EventKind.SWITCH_IN
SENT, WAIT, ARRIVED = EventKind.SENT, EventKind.WAIT, EventKind.ARRIVED


class ListRecorder:
    def __init__(self) -> None:
        self.events: list[LaneEvent] = []

    def on_event(self, event: LaneEvent) -> None:
        self.events.append(event)

    @property
    def heads(self) -> list[tuple[EventKind, int, str]]:
        return [(event.kind, event.lane, event.label) for event in self.events]


class FailingRecorder:
    """Raises at its event number `fail_at`, counting from 0."""

    def __init__(self, fail_at: int) -> None:
        self.fail_at = fail_at
        self.num_calls = 0

    def on_event(self, event: LaneEvent) -> None:
        self.num_calls += 1
        if self.num_calls > self.fail_at:
            raise OSError("disk full")


def sending(label: str, num_bytes: int = 0, ready_ns: int | None = None):
    def body():
        return finish(Pending(lambda: label, label=label, num_bytes=num_bytes, ready_ns=lambda: ready_ns))

    return body


def test_two_lanes_tell_every_event_in_order():
    recorder = ListRecorder()
    assert run_lanes([sending("a"), sending("b")], recorder=recorder) == ["a", "b"]
    assert recorder.heads == [
        (START, 0, ""),
        (SENT, 0, "a"),
        (OUT, 0, "a"),
        (START, 1, ""),
        (SENT, 1, "b"),
        (OUT, 1, "b"),
        (IN, 0, "a"),
        (WAIT, 0, "a"),
        (ARRIVED, 0, "a"),
        (END, 0, ""),
        (IN, 1, "b"),
        (WAIT, 1, "b"),
        (ARRIVED, 1, "b"),
        (END, 1, ""),
    ]


def test_a_single_lane_tells_no_switches():
    recorder = ListRecorder()
    run_lanes([sending("a")], recorder=recorder)
    assert recorder.heads == [(START, 0, ""), (SENT, 0, "a"), (WAIT, 0, "a"), (ARRIVED, 0, "a"), (END, 0, "")]


def test_no_lanes_tell_nothing():
    recorder = ListRecorder()
    run_lanes([], recorder=recorder)
    assert recorder.events == []


def test_switch_labels_are_told():
    recorder = ListRecorder()
    run_lanes([lambda: switch("gate"), lambda: None], recorder=recorder)
    assert [head for head in recorder.heads if head[0] in (OUT, IN)] == [(OUT, 0, "gate"), (IN, 0, "gate")]


def test_pendings_are_numbered_through_the_run_and_bytes_follow_them():
    recorder = ListRecorder()

    def body(sizes):
        for size in sizes:
            sending(f"{size} bytes", size)()

    run_lanes([lambda: body([10, 20]), lambda: body([30, 40])], recorder=recorder)
    for kind in (SENT, WAIT, ARRIVED):
        told = [(event.lane, event.pending, event.num_bytes) for event in recorder.events if event.kind is kind]
        assert sorted(told, key=lambda row: row[1]) == [(0, 0, 10), (1, 1, 30), (0, 2, 20), (1, 3, 40)], kind
    others = [event for event in recorder.events if event.kind not in (SENT, WAIT, ARRIVED)]
    assert {(event.pending, event.num_bytes) for event in others} == {(-1, 0)}


def test_messages_follow_their_pending():
    recorder = ListRecorder()
    run_lanes([lambda: finish(Pending(lambda: 1, label="counts and rows", num_messages=2))], recorder=recorder)
    assert {event.kind: event.num_messages for event in recorder.events} == {
        START: 0,
        SENT: 2,
        WAIT: 2,
        ARRIVED: 2,
        END: 0,
    }


def test_pending_numbers_start_anew_in_every_run():
    recorder = ListRecorder()
    for _ in range(2):
        run_lanes([sending("a")], recorder=recorder)
    assert [event.pending for event in recorder.events if event.kind is SENT] == [0, 0]


def test_pendings_outside_lanes_are_not_told():
    recorder = ListRecorder()

    def body():
        return 1

    finish(Pending.done(1, label="outside"))
    run_lanes([body], recorder=recorder)
    assert recorder.heads == [(START, 0, ""), (END, 0, "")]


def test_arrival_times_are_told_where_the_transport_knows_them():
    recorder = ListRecorder()
    run_lanes([sending("known", ready_ns=123), sending("unknown")], recorder=recorder)
    ready = {event.label: event.ready_ns for event in recorder.events if event.kind is ARRIVED}
    assert ready == {"known": 123, "unknown": None}
    assert all(event.ready_ns is None for event in recorder.events if event.kind is not ARRIVED)


def test_arrival_times_are_asked_for_after_the_wait():
    log = []
    recorder = ListRecorder()

    def body():
        finish(Pending(lambda: log.append("wait"), label="", ready_ns=lambda: log.append("ready")))

    run_lanes([body], recorder=recorder)
    assert log == ["wait", "ready"]


def test_event_times_are_those_of_the_clock(monkeypatch):
    ticks = iter(range(100, 200))
    monkeypatch.setattr(hook_module, "time", SimpleNamespace(perf_counter_ns=lambda: next(ticks)))
    recorder = ListRecorder()
    run_lanes([sending("a"), sending("b")], recorder=recorder)
    assert [event.time_ns for event in recorder.events] == list(range(100, 114))


def test_a_lane_that_fails_or_is_cancelled_tells_its_end():
    recorder = ListRecorder()

    def failing():
        raise OSError

    def never():
        raise AssertionError("started")

    with pytest.raises(OSError):
        run_lanes([lambda: switch("cancelled"), failing, never], recorder=recorder)
    assert recorder.heads == [
        (START, 0, ""),
        (OUT, 0, "cancelled"),
        (START, 1, ""),
        (END, 1, ""),
        (END, 0, ""),
    ]


@pytest.mark.parametrize("fail_at", [0, 1, 5, 13])
def test_a_failing_recorder_is_dropped_with_one_warning_and_the_run_goes_on(fail_at, caplog):
    recorder = FailingRecorder(fail_at)
    with caplog.at_level(logging.WARNING, logger="antiphon.runtime"):
        assert run_lanes([sending("a"), sending("b")], recorder=recorder) == ["a", "b"]
    assert recorder.num_calls == fail_at + 1
    warnings = [record for record in caplog.records if record.name == "antiphon.runtime"]
    assert len(warnings) == 1
    assert "disk full" in warnings[0].getMessage()


def test_a_recorder_that_works_is_never_warned_about(caplog):
    with caplog.at_level(logging.DEBUG, logger="antiphon.runtime"):
        run_lanes([sending("a"), sending("b")], recorder=ListRecorder())
    assert caplog.records == []


def test_a_failing_recorder_does_not_hide_the_error_of_a_lane():
    def failing():
        raise KeyError("lane")

    with pytest.raises(KeyError, match="lane"):
        run_lanes([failing, switch], recorder=FailingRecorder(1))


def test_a_dropped_recorder_is_tried_again_in_the_next_run():
    recorder = FailingRecorder(0)
    for _ in range(2):
        run_lanes([switch, switch], recorder=recorder)
    assert recorder.num_calls == 2


def test_a_second_finish_tells_no_second_wait():
    recorder = ListRecorder()

    def body():
        sent = Pending.done(1, label="once")
        finish(sent)
        finish(sent)

    with pytest.raises(LaneError):
        run_lanes([body], recorder=recorder)
    assert recorder.heads == [(START, 0, ""), (SENT, 0, "once"), (WAIT, 0, "once"), (ARRIVED, 0, "once"), (END, 0, "")]
