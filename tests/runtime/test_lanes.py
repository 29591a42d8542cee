"""The order in which lanes run, what a lane sees of its run, and when greenlets are created."""

import asyncio
import gc
import random
import weakref
from contextvars import Context, ContextVar, copy_context

import pytest
from greenlet import greenlet
from hypothesis import given, settings
from hypothesis import strategies as st

import antiphon.runtime.lanes as lanes_module
from antiphon.core.errors import LaneError
from antiphon.runtime import Pending, current_lane, finish, num_lanes, run_lanes, switch
from tests.support.errors import raises

REQUEST: ContextVar[str] = ContextVar("request")


def lane_recording(events: list[tuple[int, int]], lane: int, num_switches: int):
    """A lane that records (lane, turn) in each of its turns and returns its number."""

    def body() -> int:
        for turn in range(num_switches):
            events.append((lane, turn))
            switch()
        events.append((lane, num_switches))
        return lane

    return body


def round_robin(switches: list[int]) -> list[tuple[int, int]]:
    """The expected order: lane i has a turn in the rounds 0 to its number of switches."""
    return [
        (lane, turn) for turn in range(max(switches) + 1) for lane in range(len(switches)) if turn <= switches[lane]
    ]


def run_recorded(switches: list[int]) -> list[tuple[int, int]]:
    events: list[tuple[int, int]] = []
    run_lanes([lane_recording(events, lane, count) for lane, count in enumerate(switches)])
    return events


@pytest.fixture
def greenlets_made(monkeypatch):
    made = []

    def counted(*args, **kwargs):
        made.append(greenlet(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(lanes_module, "greenlet", counted)
    return made


def test_no_functions_give_no_results(greenlets_made):
    assert run_lanes([]) == []
    assert greenlets_made == []


@pytest.mark.parametrize("count", range(1, 6))
def test_results_come_in_the_order_of_the_functions(count):
    """Later lanes end first, so the order of ending is the reverse."""
    ended = []

    def body(lane):
        for _ in range(count - lane):
            switch()
        ended.append(lane)
        return f"result {lane}"

    results = run_lanes([lambda lane=lane: body(lane) for lane in range(count)])
    assert results == [f"result {lane}" for lane in range(count)]
    assert ended == list(reversed(range(count)))


@pytest.mark.parametrize(
    ("count", "order"),
    [
        (1, "000"),
        (2, "010101"),
        (3, "012012012"),
        (4, "012301230123"),
        (5, "012340123401234"),
    ],
)
def test_lanes_take_turns_from_lane_0(count, order):
    assert "".join(str(lane) for lane, _ in run_recorded([2] * count)) == order


@pytest.mark.parametrize(
    ("switches", "order"),
    [
        ([0, 3], "01111"),
        ([3, 0], "01000"),
        ([1, 3, 0], "0120111"),
        ([0, 0, 2], "01222"),
        ([2, 0, 2], "0120202"),
        ([0, 0, 0], "012"),
    ],
)
def test_lanes_that_end_early_are_passed_over(switches, order):
    assert "".join(str(lane) for lane, _ in run_recorded(switches)) == order


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_any_switch_counts_follow_the_model(switches):
    assert run_recorded(switches) == round_robin(switches)


@pytest.mark.parametrize("seed", range(3))
def test_eight_lanes_with_a_thousand_switches_follow_the_model(seed):
    chance = random.Random(seed)
    switches = [chance.choice([1000, chance.randrange(1001)]) for _ in range(8)]
    switches[seed] = 1000
    assert run_recorded(switches) == round_robin(switches)


def test_without_switches_lanes_run_one_after_the_other():
    events = []

    def body(lane):
        events.append(("begin", lane))
        events.append(("end", lane))

    run_lanes([lambda lane=lane: body(lane) for lane in range(3)])
    assert events == [(word, lane) for lane in range(3) for word in ("begin", "end")]


def test_one_function_makes_no_greenlet(greenlets_made):
    def body():
        before = len(greenlets_made)
        switch()
        return before, finish(Pending.done(7, label="own")), current_lane(), num_lanes()

    assert run_lanes([body]) == [(0, 7, 0, 1)]
    assert greenlets_made == []


@pytest.mark.parametrize("count", [2, 3, 8])
def test_several_functions_make_one_greenlet_each(greenlets_made, count):
    assert run_lanes([switch] * count) == [None] * count
    assert len(greenlets_made) == count


def test_switch_outside_lanes_does_nothing():
    assert switch() is None
    assert switch("label") is None


def test_lane_numbers_inside_and_outside():
    seen = []

    def body():
        seen.append((current_lane(), num_lanes()))
        switch()
        seen.append((current_lane(), num_lanes()))

    run_lanes([body] * 3)
    assert seen == [(0, 3), (1, 3), (2, 3)] * 2
    assert (current_lane(), num_lanes()) == (0, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_lane_numbers_are_reset_after_an_error(count):
    def body():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        run_lanes([switch] * (count - 1) + [body])
    assert (current_lane(), num_lanes()) == (0, 1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_lane_has_its_own_copy_of_the_callers_context(count):
    seen = []

    def body(lane):
        seen.append((lane, REQUEST.get()))
        REQUEST.set(f"lane {lane}")
        switch()
        seen.append((lane, REQUEST.get()))

    def caller():
        REQUEST.set("caller")
        run_lanes([lambda lane=lane: body(lane) for lane in range(count)])
        return REQUEST.get()

    assert copy_context().run(caller) == "caller"
    copied = [(lane, "caller") for lane in range(count)]
    own = [(lane, f"lane {lane}") for lane in range(count)]
    assert seen == copied + own


def test_a_context_variable_set_between_runs_is_seen_by_the_next_run():
    def caller():
        seen = []
        for word in ("first", "second"):
            REQUEST.set(word)
            seen.append(run_lanes([REQUEST.get, REQUEST.get]))
        return seen

    assert copy_context().run(caller) == [["first"] * 2, ["second"] * 2]


@pytest.mark.parametrize("lane", [0, 1])
def test_a_run_of_several_lanes_inside_a_lane_is_an_error(lane):
    never = []

    def nested():
        run_lanes([lambda: never.append(0), lambda: never.append(1)])

    functions = [switch, switch]
    functions[lane] = nested
    with raises(LaneError, "run_lanes", f"lane {lane}"):
        run_lanes(functions)
    assert never == []


def test_several_lanes_may_run_inside_a_run_of_one_lane():
    order = []

    def inner(name):
        order.append((name, current_lane(), num_lanes()))
        switch()
        order.append((name, current_lane(), num_lanes()))
        return name

    def outer():
        results = run_lanes([lambda: inner("a"), lambda: inner("b")])
        order.append(("outer", current_lane(), num_lanes()))
        return results

    assert run_lanes([outer]) == [["a", "b"]]
    assert order == [("a", 0, 2), ("b", 1, 2), ("a", 0, 2), ("b", 1, 2), ("outer", 0, 1)]


def test_lanes_inside_a_run_of_one_lane_cannot_be_nested_again():
    def outer():
        run_lanes([lambda: run_lanes([switch, switch]), switch])

    with raises(LaneError, "run_lanes", "lane 0"):
        run_lanes([outer])


def test_runs_can_follow_each_other_and_do_not_share_lanes():
    assert run_recorded([2, 1]) == run_recorded([2, 1])


def test_a_switch_in_a_greenlet_inside_a_lane_is_an_error():
    def body():
        inner = greenlet(lambda: switch("inner"))
        inner.gr_context = copy_context()
        inner.switch()

    with raises(LaneError, "'inner'", "lane 1"):
        run_lanes([switch, body])


def test_a_switch_in_a_thread_started_by_a_lane_is_an_error():
    def body():
        asyncio.run(asyncio.to_thread(switch, "from a thread"))

    with raises(LaneError, "from a thread"):
        run_lanes([switch, body])


def test_lanes_run_inside_a_greenlet_of_the_caller():
    """The hub is whichever greenlet calls `run_lanes`, not the main one."""
    assert greenlet(lambda: run_recorded([1, 2])).switch() == round_robin([1, 2])


def test_a_context_that_outlives_its_lane_is_in_no_lane() -> None:
    """As that of a task of asyncio, which a lane has made."""
    kept: list[Context] = []

    def lane() -> None:
        kept.append(copy_context())
        switch()

    run_lanes([lane, lane])
    for context in kept:
        assert context.run(current_lane) == 0 and context.run(num_lanes) == 1
        assert context.run(run_lanes, [lambda: 1, lambda: 2]) == [1, 2]


def test_what_a_lane_has_set_goes_with_the_run() -> None:
    """At once, not when the garbage collector comes: it can be tensors of a device."""

    class Large:
        pass

    variable: ContextVar[Large] = ContextVar("large")
    seen: list[weakref.ref[Large]] = []

    def lane() -> None:
        variable.set(Large())
        seen.append(weakref.ref(variable.get()))
        finish(Pending.done(1, label="here"))

    gc.collect()
    gc.disable()
    try:
        run_lanes([lane, lane])
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()
