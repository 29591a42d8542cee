"""Lane i passes an order point only after lane i-1 has passed it as often, or has ended."""

import pytest

from antiphon.core.errors import LaneError
from antiphon.runtime import order_point, run_lanes, switch
from tests.support.errors import raises

KEY = ("keys and values", 3)


def passing(log: list, lane: int, *, before: int = 0, times: int = 1, key: object = KEY):
    """A lane that switches `before` times, then passes the point `times` times with a switch after each."""

    def body():
        for _ in range(before):
            switch()
        for count in range(times):
            order_point(key)
            log.append((lane, count))
            switch()

    return body


def test_lanes_in_order_pass():
    log = []
    run_lanes([passing(log, lane, times=3) for lane in range(4)])
    assert log == [(lane, count) for count in range(3) for lane in range(4)]


@pytest.mark.parametrize("lane", [1, 2])
def test_a_lane_ahead_of_the_one_before_is_an_error(lane):
    log = []
    functions = [passing(log, index, before=0 if index < lane - 1 else 1) for index in range(lane)]
    with raises(LaneError, f"lane {lane} ", "'keys and values', 3", f"lane {lane - 1}"):
        run_lanes([*functions, passing(log, lane)])
    assert (lane, 0) not in log


def test_a_lane_ahead_in_a_later_layer_is_an_error():
    log = []

    def first():
        order_point(KEY)
        switch()
        switch()
        order_point(KEY)

    with raises(LaneError, "lane 1 ", "lane 0"):
        run_lanes([first, passing(log, 1, times=2)])
    assert log == [(1, 0)]


def test_the_lane_before_may_be_any_number_of_times_ahead():
    log = []

    def first():
        for _ in range(5):
            order_point(KEY)
        switch()

    run_lanes([first, passing(log, 1, times=5)])
    assert log == [(1, count) for count in range(5)]


def test_keys_are_counted_apart():
    def first():
        order_point("layer 0")
        switch()
        order_point("layer 1")

    def second():
        order_point("layer 0")
        order_point("layer 1")

    with raises(LaneError, "'layer 1'"):
        run_lanes([first, second])


def test_a_lane_before_that_has_ended_is_no_obstacle():
    log = []
    run_lanes([lambda: None, passing(log, 1, times=2)])
    assert log == [(1, 0), (1, 1)]


def test_a_lane_compares_only_with_the_one_directly_before():
    """Lane 0 has ended without passing; lane 2 must still wait for lane 1."""
    log = []
    with raises(LaneError, "lane 2 ", "lane 1"):
        run_lanes([lambda: None, passing(log, 1, before=1), passing(log, 2)])
    assert log == []


def test_outside_lanes_and_in_a_single_lane_it_does_nothing():
    order_point(KEY)
    log = []
    run_lanes([passing(log, 0, times=2)])
    assert log == [(0, 0), (0, 1)]


def test_counts_start_anew_in_every_run():
    log = []
    run_lanes([passing(log, lane) for lane in range(2)])
    with pytest.raises(LaneError):
        run_lanes([passing(log, 0, before=1), passing(log, 1)])
