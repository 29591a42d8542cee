"""What happens to the other lanes and to pendings when a lane fails."""

import contextlib
import gc
import sys
import threading
import traceback

import pytest
import torch
from greenlet import GreenletExit

from antiphon.core.errors import LaneError
from antiphon.runtime import Pending, finish, run_lanes, switch
from antiphon.runtime.lane import LaneCancelled
from tests.support.errors import raises


class ExpertError(Exception):
    """The first error of a run."""


def fail_in_expert():
    raise ExpertError("expert 3")


def switch_then_fail():
    switch("before failing")
    fail_in_expert()


def lane_cleaning_up(log: list, name: str, num_switches: int = 9):
    def body():
        try:
            for _ in range(num_switches):
                switch(name)
            log.append(f"{name} ran on")
        finally:
            log.append(f"{name} cleaned up")

    return body


@pytest.mark.parametrize("function", [fail_in_expert, switch_then_fail])
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_the_error_is_raised_as_it_is_with_its_own_traceback(function, lane):
    functions = [switch, switch, switch]
    functions[lane] = function
    with pytest.raises(ExpertError, match=r"^expert 3$") as caught:
        run_lanes(functions)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "fail_in_expert"
    assert names.count("fail_in_expert") == 1
    assert names[0] == "test_the_error_is_raised_as_it_is_with_its_own_traceback"
    assert "run_lanes" in names
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    assert getattr(caught.value, "__notes__", []) == []


def test_the_error_of_a_single_lane_is_raised_as_it_is():
    with pytest.raises(ExpertError) as caught:
        run_lanes([switch_then_fail])
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "fail_in_expert"


def test_the_same_exception_object_is_raised():
    error = ExpertError("mine")

    def body():
        raise error

    with pytest.raises(ExpertError) as caught:
        run_lanes([switch, body])
    assert caught.value is error


def test_the_other_lanes_are_cancelled_at_their_switch():
    log = []
    with pytest.raises(ExpertError):
        run_lanes([lane_cleaning_up(log, "before"), switch_then_fail, lane_cleaning_up(log, "after")])
    assert sorted(log) == ["after cleaned up", "before cleaned up"]


def test_cancelling_is_no_exception_that_lanes_catch_by_habit():
    assert not issubclass(LaneCancelled, Exception)
    seen = []

    def body():
        try:
            switch()
            switch()
            seen.append("ran on")
        except Exception as error:
            seen.append(error)
        except BaseException as error:
            seen.append(type(error))
            raise

    with pytest.raises(ExpertError):
        run_lanes([body, switch_then_fail])
    assert seen == [LaneCancelled]


def test_lanes_that_never_started_are_never_run():
    log = []
    with pytest.raises(ExpertError):
        run_lanes([lane_cleaning_up(log, "started"), fail_in_expert, lambda: log.append("never")])
    assert log == ["started cleaned up"]


def test_lanes_that_have_ended_are_left_alone():
    log = []
    with pytest.raises(ExpertError):
        run_lanes([lane_cleaning_up(log, "ended", num_switches=0), switch_then_fail])
    assert log == ["ended ran on", "ended cleaned up"]


def test_an_error_in_a_cleanup_is_noted_on_the_first_error():
    def body():
        try:
            switch()
            switch()
        finally:
            raise OSError("pinned memory")

    with pytest.raises(ExpertError) as caught:
        run_lanes([switch_then_fail, body])
    (note,) = caught.value.__notes__
    assert "lane 1" in note
    assert "OSError('pinned memory')" in note


def test_errors_in_all_cleanups_are_noted_and_all_cleanups_run():
    log = []

    def body(name):
        try:
            switch()
            switch()
        finally:
            log.append(name)
            raise OSError(name)

    with pytest.raises(ExpertError) as caught:
        run_lanes([lambda: body("zero"), switch_then_fail, lambda: body("two")])
    assert log == ["zero", "two"]
    assert [("zero" in note, "two" in note) for note in caught.value.__notes__] == [(True, False), (False, True)]


def test_a_switch_in_a_cleanup_is_cancelled_too():
    log = []

    def body():
        try:
            switch()
            switch()
        finally:
            log.append("first cleanup")
            try:
                switch("in a cleanup")
                log.append("ran on")
            finally:
                log.append("second cleanup")

    with pytest.raises(ExpertError) as caught:
        run_lanes([body, switch_then_fail])
    assert log == ["first cleanup", "second cleanup"]
    assert not hasattr(caught.value, "__notes__")


def test_a_lane_that_swallows_its_cancellation_and_ends_is_no_trouble():
    log = []

    def body():
        try:
            switch()
            switch()
        except LaneCancelled:
            log.append("swallowed")
        return "ended"

    with pytest.raises(ExpertError) as caught:
        run_lanes([body, switch_then_fail])
    assert log == ["swallowed"]
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.timeout(30)
def test_a_lane_that_swallows_every_cancellation_does_not_hang():
    swallowed = []
    stop = threading.Event()

    def stubborn():
        while not stop.is_set():
            try:
                switch()
            except BaseException as error:
                swallowed.append(type(error))

    log = []
    try:
        with pytest.raises(ExpertError) as caught:
            run_lanes([stubborn, switch_then_fail, lane_cleaning_up(log, "well-behaved")])
    finally:
        stop.set()
    assert set(swallowed) == {LaneCancelled}
    (note,) = caught.value.__notes__
    assert "lane 0 did not end" in note
    assert log == ["well-behaved cleaned up"]


@pytest.mark.timeout(30)
def test_a_lane_that_was_given_up_may_end_in_another_torch_state(monkeypatch):
    ended = []
    stop = threading.Event()

    def stubborn():
        while not stop.is_set():
            with contextlib.suppress(BaseException):
                switch()
        ended.append("stubborn")

    try:
        with pytest.raises(ExpertError) as caught:
            run_lanes([stubborn, switch_then_fail])
    finally:
        stop.set()
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with torch.device("cpu"):  # a function mode, which the check of a lane's end would see
        del caught  # its traceback holds the lanes
        gc.collect()
    assert ended == ["stubborn"]
    assert unraisable == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [0, 1])
def test_exits_of_the_process_cancel_the_other_lanes_too(kind, before):
    log = []

    def body():
        for _ in range(before):
            switch()
        raise kind

    with pytest.raises(kind):
        run_lanes([lane_cleaning_up(log, "other"), body])
    assert log == ["other cleaned up"]


def test_a_greenlet_exit_in_a_lane_is_raised_like_any_error():
    log = []

    def body():
        raise GreenletExit("stop")

    with pytest.raises(GreenletExit):
        run_lanes([lane_cleaning_up(log, "other"), body])
    assert log == ["other cleaned up"]


def test_what_is_pending_is_abandoned_once_and_never_waited_for():
    log = []

    def body(lane):
        sent = Pending(
            lambda: log.append(f"waited {lane}"), label="dispatch", abandon=lambda: log.append(f"abandoned {lane}")
        )
        switch()
        if lane == 1:
            fail_in_expert()
        finish(sent)

    with pytest.raises(ExpertError):
        run_lanes([lambda lane=lane: body(lane) for lane in range(3)])
    assert sorted(log) == ["abandoned 0", "abandoned 1", "abandoned 2"]


def test_what_is_pending_in_a_single_lane_is_abandoned():
    log = []

    def body():
        Pending(lambda: None, label="dispatch", abandon=lambda: log.append("abandoned"))
        fail_in_expert()

    with pytest.raises(ExpertError):
        run_lanes([body])
    assert log == ["abandoned"]


def test_pendings_are_abandoned_after_the_lanes_have_cleaned_up():
    """A cleanup may still use what the pending holds."""
    log = []

    def body():
        Pending(lambda: None, label="dispatch", abandon=lambda: log.append("abandoned"))
        try:
            switch()
            switch()
        finally:
            log.append("cleaned up")

    with pytest.raises(ExpertError):
        run_lanes([body, switch_then_fail])
    assert log == ["cleaned up", "abandoned"]


def test_finished_pendings_are_not_abandoned():
    log = []

    def body():
        sent = Pending(lambda: log.append("waited"), label="dispatch", abandon=lambda: log.append("abandoned"))
        finish(sent)
        fail_in_expert()

    with pytest.raises(ExpertError):
        run_lanes([body, switch])
    assert log == ["waited"]


def fail_with_pendings(num_pendings: int, log: list) -> None:
    def abandon(number):
        log.append(number)
        raise OSError(f"buffer {number}")

    for number in range(num_pendings):
        Pending(lambda: None, label=f"dispatch {number}", abandon=lambda number=number: abandon(number))
    fail_in_expert()


def test_an_abandon_that_fails_does_not_hide_the_error_of_the_lane():
    with pytest.raises(ExpertError):
        run_lanes([lambda: fail_with_pendings(1, []), switch])


def test_an_abandon_that_fails_does_not_keep_the_others_from_being_abandoned():
    log = []
    with pytest.raises((ExpertError, OSError)):
        run_lanes([lambda: fail_with_pendings(3, log), switch])
    assert sorted(log) == [0, 1, 2]


def test_an_error_of_a_wait_cancels_the_other_lanes():
    log = []

    def body():
        finish(Pending(fail_in_expert, label="dispatch"))

    with pytest.raises(ExpertError) as caught:
        run_lanes([lane_cleaning_up(log, "other"), body])
    assert log == ["other cleaned up"]
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "fail_in_expert"


def test_the_runtime_works_again_after_an_error():
    with pytest.raises(ExpertError):
        run_lanes([switch, switch_then_fail])
    assert run_lanes([lambda: finish(Pending.done("rows", label=""))] * 2) == ["rows", "rows"]


def test_a_lane_error_ends_the_other_lanes_as_any_error_does():
    log = []

    def forgetful():
        Pending(lambda: None, label="forgotten")

    with raises(LaneError, "forgotten", remedy="finish"):
        run_lanes([lane_cleaning_up(log, "other"), forgetful])
    assert log == ["other cleaned up"]
