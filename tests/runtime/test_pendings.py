"""A pending is finished exactly once, in its lane, after exactly one switch."""

import pytest

from antiphon.core.errors import LaneError
from antiphon.runtime import Pending, finish, run_lanes, switch
from tests.support.errors import raises


def turns_until_told(log: list, name: str, num_turns: int):
    """A lane that logs its name in each turn."""

    def body():
        for _ in range(num_turns):
            log.append(name)
            switch()

    return body


def test_finish_switches_exactly_once_and_waits_exactly_once():
    log = []

    def wait():
        log.append("waited")
        return "rows"

    def body():
        sent = Pending(wait, label="dispatch")
        log.append("sent")
        assert finish(sent) == "rows"
        log.append("finished")

    run_lanes([body, turns_until_told(log, "other", 3)])
    assert log == ["sent", "other", "waited", "finished", "other", "other"]


def test_wait_alone_never_switches():
    log = []

    def body():
        assert Pending(lambda: 1, label="dispatch").wait() == 1
        log.append("finished")

    run_lanes([body, turns_until_told(log, "other", 2)])
    assert log == ["finished", "other", "other"]


def test_making_a_pending_never_switches():
    log = []

    def body():
        sent = Pending.done(1, label="dispatch")
        log.append("sent")
        finish(sent)

    run_lanes([body, turns_until_told(log, "other", 1)])
    assert log == ["sent", "other"]


def test_a_late_launch_comes_after_the_other_lanes_work_and_before_the_wait():
    log = []

    def body(lane):
        log.append(f"work {lane}")
        sent = Pending(
            lambda: log.append(f"wait {lane}"), label="dispatch", launch=lambda: log.append(f"launch {lane}")
        )
        log.append(f"cover {lane}")
        finish(sent)

    run_lanes([lambda lane=lane: body(lane) for lane in range(2)])
    assert log == ["work 0", "cover 0", "work 1", "cover 1", "launch 0", "wait 0", "launch 1", "wait 1"]


def test_a_late_launch_in_a_single_lane_comes_before_the_wait():
    log = []

    def body():
        sent = Pending(lambda: log.append("wait"), label="", launch=lambda: log.append("launch"))
        log.append("cover")
        finish(sent)

    run_lanes([body])
    assert log == ["cover", "launch", "wait"]


def test_pendings_work_outside_lanes():
    log = []
    sent = Pending(lambda: log.append("wait") or 5, label="", launch=lambda: log.append("launch"))
    assert finish(sent) == 5
    assert log == ["launch", "wait"]


def test_a_done_pending_brings_its_value():
    value = object()
    assert finish(Pending.done(value, label="local")) is value


def test_pendings_may_be_finished_in_another_order_than_sent():
    def body():
        first, second = Pending.done(1, label="first"), Pending.done(2, label="second")
        return finish(second), finish(first)

    assert run_lanes([body, body]) == [(2, 1), (2, 1)]


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_finishing_twice_is_an_error_and_waits_only_once(num_lanes):
    waits = []

    def body():
        sent = Pending(lambda: waits.append(1), label="dispatch layer 3")
        finish(sent)
        finish(sent)

    with raises(LaneError, "'dispatch layer 3'"):
        run_lanes([body] + [switch] * (num_lanes - 1))
    assert waits == [1]


def test_finishing_twice_outside_lanes_is_an_error():
    sent = Pending.done(1, label="dispatch")
    finish(sent)
    with raises(LaneError, "'dispatch'"):
        finish(sent)


def test_finishing_after_a_failed_wait_is_an_error():
    def fail():
        raise OSError("peer")

    sent = Pending(fail, label="dispatch")
    with pytest.raises(OSError, match="peer"):
        finish(sent)
    with raises(LaneError, "'dispatch'"):
        finish(sent)


def test_finishing_in_another_lane_is_an_error():
    shared, waits = [], []

    def sender():
        shared.append(Pending(lambda: waits.append(1), label="dispatch layer 3"))
        switch()
        switch()

    with raises(LaneError, "'dispatch layer 3'", "by lane 0", "by lane 1"):
        run_lanes([sender, lambda: finish(shared[0])])
    assert waits == []


def test_finishing_in_a_lane_what_was_sent_outside_is_an_error():
    sent = Pending.done(1, label="dispatch")
    with raises(LaneError, "by no lane", "by lane 1"):
        run_lanes([switch, lambda: finish(sent)])


def test_finishing_after_the_run_what_a_lane_sent_is_an_error():
    kept = []

    def body():
        kept.append(Pending.done(1, label="dispatch"))

    with raises(LaneError, "lane 0", remedy="finish"):
        run_lanes([body, switch])
    with raises(LaneError, "by lane 0", "by no lane"):
        finish(kept[0])


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_not_finishing_is_an_error_that_names_the_pendings(num_lanes):
    abandoned = []

    def body():
        Pending(lambda: None, label="dispatch layer 3", abandon=lambda: abandoned.append("dispatch"))
        Pending(lambda: None, label="shared gather", abandon=lambda: abandoned.append("gather"))

    with raises(LaneError, "lane 0 ", "'dispatch layer 3', 'shared gather'", remedy="finish"):
        run_lanes([body] + [switch] * (num_lanes - 1))
    assert sorted(abandoned) == ["dispatch", "gather"]


def test_a_finished_pending_does_not_count_as_unfinished():
    def body():
        finish(Pending.done(1, label="finished"))
        Pending.done(2, label="forgotten")

    with raises(LaneError, "'forgotten'", remedy="finish"):
        run_lanes([body])


def test_waiting_for_an_abandoned_pending_is_an_error():
    sent = Pending.done(1, label="dispatch")
    sent.abandon()
    with pytest.raises(LaneError):
        sent.wait()
