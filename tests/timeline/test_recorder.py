"""The recorder cuts events into steps and keeps the last ones."""

import pytest

from antiphon.runtime import EventKind, LaneEvent, Pending, finish, run_lanes, switch
from antiphon.timeline import StepRecorder


def run_steps(recorder: StepRecorder, numbers) -> None:
    for number in numbers:
        with recorder.step(number, kind="dual", num_tokens=10 * number):
            run_lanes([lambda number=number: switch(f"step {number}"), switch], recorder=recorder)


@pytest.mark.parametrize(("num_kept", "num_steps"), [(1, 5), (3, 5), (5, 5), (8, 5)])
def test_only_the_last_steps_are_kept(num_kept, num_steps):
    recorder = StepRecorder(num_kept)
    run_steps(recorder, range(num_steps))
    kept = list(range(num_steps))[-num_kept:]
    assert [step.number for step in recorder.steps] == kept
    assert [step.num_tokens for step in recorder.steps] == [10 * number for number in kept]


def test_the_default_keeps_sixty_four():
    recorder = StepRecorder()
    run_steps(recorder, range(70))
    assert [step.number for step in recorder.steps] == list(range(6, 70))


def test_each_step_has_its_own_events_and_all_of_them():
    recorder = StepRecorder()
    run_steps(recorder, [1, 2])
    for step in recorder.steps:
        labels = {event.label for event in step.events}
        assert labels == {"", f"step {step.number}"}
        kinds = [event.kind for event in step.events]
        assert kinds.count(EventKind.START) == kinds.count(EventKind.END) == 2
        assert kinds.count(EventKind.SWITCH_OUT) == kinds.count(EventKind.SWITCH_IN) == 2


def test_events_lie_between_the_start_and_the_end_of_their_step():
    recorder = StepRecorder()
    run_steps(recorder, [1, 2])
    first, second = recorder.steps
    for step in (first, second):
        times = [event.time_ns for event in step.events]
        assert [step.start_ns, *times, step.end_ns] == sorted([step.start_ns, *times, step.end_ns])
        assert step.duration_s == pytest.approx((step.end_ns - step.start_ns) / 1e9)
        assert step.duration_s > 0
    assert first.end_ns <= second.start_ns


def test_events_outside_steps_are_dropped():
    recorder = StepRecorder()
    event = LaneEvent(EventKind.START, 0, "", 1)
    recorder.on_event(event)
    with recorder.step(0, kind="serial", num_tokens=1):
        pass
    recorder.on_event(event)
    assert [step.events for step in recorder.steps] == [[]]


def test_the_timeline_of_a_step_is_the_one_that_is_kept():
    recorder = StepRecorder()
    with recorder.step(7, kind="dual", num_tokens=3) as timeline:
        run_lanes([lambda: finish(Pending.done(1, label="a"))], recorder=recorder)
        assert len(recorder.steps) == 0
    assert recorder.steps[-1] is timeline
    assert (timeline.number, timeline.kind, timeline.num_tokens) == (7, "dual", 3)


def test_a_step_that_fails_is_kept_with_its_end_and_closes():
    recorder = StepRecorder()
    with pytest.raises(OSError, match="peer"), recorder.step(0, kind="dual", num_tokens=1):
        recorder.on_event(LaneEvent(EventKind.START, 0, "", 1))
        raise OSError("peer")
    recorder.on_event(LaneEvent(EventKind.START, 1, "", 2))
    (step,) = recorder.steps
    assert len(step.events) == 1
    assert step.end_ns >= step.start_ns > 0
