"""Grad mode, inference mode and autocast belong to the thread: a lane must leave them as it found them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from antiphon.core.errors import LaneError
from antiphon.runtime import Pending, finish, run_lanes, switch
from tests.support.errors import raises


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CHANGES = {
    "grad mode": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": float64_by_default,
    "function modes": lambda: torch.device("meta"),
}


def thread_state() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


@pytest.fixture(autouse=True)
def unchanged_state():
    before = thread_state()
    yield
    after = thread_state()
    torch.set_grad_enabled(True)
    assert after == before


def switch_inside(context) -> None:
    with context():
        switch("in the block")


def finish_inside(context) -> None:
    sent = Pending.done(1, label="in the block")
    with context():
        finish(sent)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("yielding", [switch_inside, finish_inside])
@pytest.mark.parametrize("lane", [0, 1])
def test_state_changed_at_a_switch_is_an_error_that_names_it(name, yielding, lane):
    seen = []

    def other():
        switch()
        seen.append(thread_state())

    functions = [other, other]
    functions[lane] = lambda: yielding(CHANGES[name])
    before = thread_state()
    with raises(LaneError, f"lane {lane} ", "'in the block'", name, remedy="run_lanes"):
        run_lanes(functions)
    assert thread_state() == before
    assert seen in ([], [before])


def test_the_message_says_what_changed_to_what():
    with raises(LaneError, "grad mode True -> False"):
        run_lanes([lambda: switch_inside(torch.no_grad), switch])


def test_no_other_lane_runs_while_the_state_is_changed():
    seen = []

    def other():
        seen.append(thread_state())
        switch()
        seen.append(thread_state())

    with pytest.raises(LaneError):
        run_lanes([lambda: switch_inside(torch.no_grad), other])
    assert seen == []


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_switches_are_fine(name):
    def body():
        with CHANGES[name]():
            inside = thread_state()
        switch()
        with CHANGES[name]():
            assert thread_state() == inside
        return inside != thread_state()

    assert run_lanes([body, body]) == [True, True]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_state_set_outside_is_fine_and_seen_by_every_lane(name, num_lanes):
    def body():
        first = thread_state()
        finish(Pending.done(1, label="dispatch"))
        return first, thread_state()

    outside = thread_state()
    with CHANGES[name]():
        inside = thread_state()
        assert run_lanes([body] * num_lanes) == [(inside, inside)] * num_lanes
    assert inside != outside


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_state_left_changed_at_the_end_is_an_error(num_lanes):
    def body():
        torch.set_grad_enabled(False)

    try:
        with raises(LaneError, "lane 0 ", remedy="run_lanes"):
            run_lanes([body] + [switch] * (num_lanes - 1))
    finally:
        torch.set_grad_enabled(True)


def test_a_lane_that_turns_off_what_was_set_outside_is_an_error():
    with torch.inference_mode(), raises(LaneError, "inference mode True -> False"):
        run_lanes([lambda: switch_inside(lambda: torch.inference_mode(False)), switch])


def test_another_autocast_dtype_at_a_switch_is_an_error():
    """Autocast stays enabled, but the other lanes would compute in the wrong dtype."""
    with torch.autocast("cpu", dtype=torch.bfloat16), raises(LaneError, "autocast"):
        run_lanes([lambda: switch_inside(lambda: torch.autocast("cpu", dtype=torch.float16)), switch])


@pytest.mark.parametrize("name", CHANGES)
def test_an_error_inside_a_block_leaves_the_state_restored(name):
    def body():
        with CHANGES[name]():
            raise OSError("inside")

    with pytest.raises(OSError, match="inside"):
        run_lanes([switch, body])


@pytest.mark.parametrize("name", CHANGES)
def test_an_error_of_a_cancelled_lane_leaves_the_state_restored(name):
    """The cancelled lane changes the state in its cleanup, and its own block restores it."""
    during = []

    def body():
        try:
            switch()
            switch()
        finally:
            with CHANGES[name]():
                during.append(thread_state())

    def failing():
        switch()
        raise OSError("first")

    before = thread_state()
    with pytest.raises(OSError, match="first"):
        run_lanes([body, failing])
    assert during != [before]
    assert thread_state() == before


def test_a_single_lane_may_finish_inside_a_block():
    """With one lane nothing else runs, so the reference path has no check at its switches."""

    def body():
        with torch.no_grad():
            return finish(Pending.done(1, label="dispatch"))

    assert run_lanes([body]) == [1]


def test_gradients_flow_through_lanes():
    weight = torch.ones(3, requires_grad=True)

    def body(factor):
        y = weight * factor
        finish(Pending.done(None, label="dispatch"))
        return y.sum()

    with nullcontext():
        sum(run_lanes([lambda: body(2.0), lambda: body(3.0)])).backward()
    assert weight.grad.tolist() == [5.0] * 3
