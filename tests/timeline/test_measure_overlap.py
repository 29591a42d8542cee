"""Measured overlap of hand-built steps, compared with the known answers."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import antiphon.runtime.hook as hook_module
from antiphon.runtime import EventKind, LaneEvent, Pending, finish, run_lanes
from antiphon.timeline import OverlapTotals, StepOverlap, StepRecorder, StepTimeline, measure_overlap


def communication(
    pending: int,
    *,
    sent: int,
    wait: int,
    ready: int | None,
    arrived: int,
    lane: int = 0,
    num_bytes: int = 0,
    num_messages: int = 0,
) -> list[LaneEvent]:
    """The three events of one pending; times in ns."""
    name = f"dispatch {pending}"
    sizes = {"pending": pending, "num_bytes": num_bytes, "num_messages": num_messages}
    return [
        LaneEvent(EventKind.SENT, lane, name, sent, **sizes),
        LaneEvent(EventKind.WAIT, lane, name, wait, **sizes),
        LaneEvent(EventKind.ARRIVED, lane, name, arrived, **sizes, ready_ns=ready),
    ]


def step_of(*communications: list[LaneEvent], end_ns: int = 1000) -> StepTimeline:
    events = sorted((event for events in communications for event in events), key=lambda event: event.time_ns)
    events.insert(0, LaneEvent(EventKind.START, 0, "", 0))
    events.append(LaneEvent(EventKind.END, 0, "", end_ns))
    return StepTimeline(number=0, kind="dual", num_tokens=4, start_ns=0, end_ns=end_ns, events=events)


def measured_ns(step: StepTimeline) -> tuple[int, int, int]:
    """Communication, exposed and hidden, in ns."""
    overlap = measure_overlap(step)
    return tuple(round(t * 1e9) for t in (overlap.communication_s, overlap.exposed_s, overlap.hidden_s))


def test_a_serial_step_hides_nothing():
    step = step_of(
        communication(0, sent=100, wait=100, ready=300, arrived=300),
        communication(1, sent=500, wait=500, ready=600, arrived=600),
    )
    assert measured_ns(step) == (300, 300, 0)


def test_perfect_overlap_exposes_nothing():
    step = step_of(communication(0, sent=100, wait=400, ready=300, arrived=401))
    assert measured_ns(step) == (200, 0, 200)


def test_partial_overlap_exposes_only_the_wait():
    step = step_of(communication(0, sent=100, wait=250, ready=400, arrived=410))
    assert measured_ns(step) == (300, 150, 150)


def test_work_of_the_wait_after_the_arrival_is_neither_communication_nor_exposed():
    """Unpacking, or a host that came back late."""
    step = step_of(communication(0, sent=100, wait=200, ready=300, arrived=700))
    assert measured_ns(step) == (200, 100, 100)


def test_overlapping_communications_are_counted_once():
    step = step_of(
        communication(0, sent=100, wait=500, ready=300, arrived=501),
        communication(1, sent=200, wait=600, ready=400, arrived=601, lane=1),
    )
    assert measured_ns(step) == (300, 0, 300)


def test_one_communication_inside_another_adds_nothing():
    step = step_of(
        communication(0, sent=100, wait=500, ready=400, arrived=501),
        communication(1, sent=200, wait=600, ready=300, arrived=601, lane=1),
    )
    assert measured_ns(step) == (300, 0, 300)


def test_separate_communications_are_added():
    step = step_of(
        communication(0, sent=100, wait=500, ready=200, arrived=501),
        communication(1, sent=300, wait=600, ready=450, arrived=601, lane=1),
    )
    assert measured_ns(step) == (250, 0, 250)


def test_waits_of_all_lanes_are_exposed():
    step = step_of(
        communication(0, sent=100, wait=200, ready=300, arrived=300),
        communication(1, sent=150, wait=350, ready=500, arrived=500, lane=1),
    )
    assert measured_ns(step) == (400, 250, 150)


def test_a_transport_that_sends_nothing_counts_nothing():
    step = step_of(communication(0, sent=100, wait=200, ready=None, arrived=900, num_bytes=4096))
    overlap = measure_overlap(step)
    assert measured_ns(step) == (0, 0, 0)
    assert overlap.num_bytes == 0


def unobserved(pending: int, **times: int) -> list[LaneEvent]:
    """Messages whose arrival the host does not see, as over a GPU's transport."""
    return communication(pending, **times, ready=None, num_bytes=4096, num_messages=1)


def test_what_the_host_cannot_see_is_not_called_zero():
    """A GPU's stream waits for the data, so whether it was hidden is unknown. The counts of `alltoall` are observed."""
    counts = communication(0, sent=100, wait=100, ready=200, arrived=200, num_bytes=64)
    step = step_of(
        counts, unobserved(1, sent=200, wait=300, arrived=301), unobserved(2, sent=400, wait=400, arrived=401)
    )
    assert measure_overlap(step) == StepOverlap(
        time_s=step.duration_s, communication_s=None, exposed_s=None, hidden_s=None, num_bytes=64 + 2 * 4096
    )


def test_one_missed_arrival_does_not_hide_the_others():
    step = step_of(
        communication(0, sent=100, wait=100, ready=300, arrived=300, num_messages=1),
        unobserved(1, sent=400, wait=500, arrived=501),
    )
    assert measured_ns(step) == (200, 200, 0)


def test_a_ready_time_after_the_arrival_is_cut_to_it():
    step = step_of(communication(0, sent=100, wait=200, ready=5000, arrived=300))
    assert measured_ns(step) == (200, 100, 100)


def test_data_that_was_there_before_the_sent_event_is_no_communication():
    step = step_of(communication(0, sent=100, wait=200, ready=90, arrived=201))
    assert measured_ns(step) == (0, 0, 0)


def test_what_was_sent_and_never_waited_for_is_left_out():
    step = step_of(communication(0, sent=100, wait=200, ready=300, arrived=300))
    step.events.insert(1, LaneEvent(EventKind.SENT, 1, "abandoned", 50, pending=1, num_bytes=4096))
    assert measured_ns(step) == (200, 100, 100)
    assert measure_overlap(step).num_bytes == 0


def test_bytes_are_counted_once_a_communication():
    step = step_of(
        communication(0, sent=100, wait=200, ready=300, arrived=300, num_bytes=100),
        communication(1, sent=110, wait=310, ready=320, arrived=320, num_bytes=23, lane=1),
    )
    assert measure_overlap(step).num_bytes == 123


def test_a_step_without_events_has_only_its_time():
    step = StepTimeline(number=0, kind="serial", num_tokens=1, start_ns=1_000_000_000, end_ns=3_500_000_000)
    assert measure_overlap(step) == StepOverlap(
        time_s=2.5, communication_s=0.0, exposed_s=0.0, hidden_s=0.0, num_bytes=0
    )


@st.composite
def host_schedules(draw):
    """Communications of one host thread: waits block it one after the other, whatever was sent before."""
    clock, communications = 0, []
    for pending in range(draw(st.integers(0, 6))):
        wait = clock + draw(st.integers(0, 50))
        sent = draw(st.integers(0, wait))
        ready = draw(st.integers(sent, wait + 60))
        clock = max(wait, ready) + draw(st.integers(0, 5))
        communications.append(communication(pending, sent=sent, wait=wait, ready=ready, arrived=clock))
    return step_of(*communications, end_ns=clock + 1)


def busy_ticks(step: StepTimeline) -> tuple[set[int], set[int]]:
    """Ticks with a communication under way, and ticks in which the host waited for one that was."""
    by_pending: dict[int, dict[EventKind, LaneEvent]] = {}
    for event in step.events:
        if event.pending >= 0:
            by_pending.setdefault(event.pending, {})[event.kind] = event
    under_way: set[int] = set()
    waited: set[int] = set()
    for events in by_pending.values():
        ready = events[EventKind.ARRIVED].ready_ns
        under_way |= set(range(events[EventKind.SENT].time_ns, ready))
        waited |= set(range(events[EventKind.WAIT].time_ns, ready))
    return under_way, waited


@settings(deadline=None)
@given(host_schedules())
def test_any_step_is_measured_as_counting_ticks_does(step):
    under_way, waited = busy_ticks(step)
    assert measured_ns(step) == (len(under_way), len(waited), len(under_way - waited))


class Clock:
    """A clock that advances only on request."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now

    def sleep_until(self, when: int) -> None:
        self.now = max(self.now, when)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(hook_module, "time", SimpleNamespace(perf_counter_ns=clock.perf_counter_ns))
    return clock


def moe_layer(clock: Clock, *, compute_ns: int, flight_ns: int, late: bool = False):
    """Send, compute for a while, finish; with `late` the flight starts in `finish`."""
    arrival = 0

    def launch():
        nonlocal arrival
        arrival = clock.now + flight_ns

    if not late:
        launch()
    sent = Pending(
        lambda: clock.sleep_until(arrival),
        label="dispatch",
        launch=launch if late else None,
        ready_ns=lambda: arrival,
        num_bytes=10,
    )
    clock.now += compute_ns
    finish(sent)


def run_step(clock: Clock, num_lanes: int, **layer) -> tuple[int, int, int]:
    recorder = StepRecorder()
    with recorder.step(0, kind="", num_tokens=1) as timeline:
        run_lanes([lambda: moe_layer(clock, **layer)] * num_lanes, recorder=recorder)
    assert measure_overlap(timeline).num_bytes == 10 * num_lanes
    return measured_ns(timeline)


def test_one_lane_without_compute_in_between_is_fully_exposed(clock):
    assert run_step(clock, 1, compute_ns=0, flight_ns=100) == (100, 100, 0)


def test_compute_of_the_other_lane_hides_communication(clock):
    """Lane 0 flies from 0 to 100, lane 1 from 60 to 160; the host computes until 120, then waits until 160."""
    assert run_step(clock, 2, compute_ns=60, flight_ns=100) == (160, 40, 120)


def test_compute_beside_a_late_launch_hides_nothing_of_it(clock):
    """Nothing is on its way before `finish` launches it, so all of it is exposed in a single lane."""
    assert run_step(clock, 1, compute_ns=60, flight_ns=100, late=True) == (100, 100, 0)


def test_totals_add_up_by_kind_of_plan():
    totals = OverlapTotals()
    one = StepOverlap(time_s=1.0, communication_s=0.5, exposed_s=0.25, hidden_s=0.25, num_bytes=10)
    two = StepOverlap(time_s=2.0, communication_s=1.0, exposed_s=0.25, hidden_s=0.75, num_bytes=20)
    for kind, overlap in (("dual", one), ("serial", one), ("dual", two)):
        totals.add(kind, overlap)
    assert totals.to_dict() == {
        "dual": {"time_s": 3.0, "communication_s": 1.5, "exposed_s": 0.5, "hidden_s": 1.0, "num_bytes": 30},
        "serial": {"time_s": 1.0, "communication_s": 0.5, "exposed_s": 0.25, "hidden_s": 0.25, "num_bytes": 10},
    }


def test_totals_of_what_was_not_observed_are_none():
    totals = OverlapTotals()
    unseen = StepOverlap(time_s=1.0, communication_s=None, exposed_s=None, hidden_s=None, num_bytes=10)
    seen = StepOverlap(time_s=2.0, communication_s=1.0, exposed_s=0.25, hidden_s=0.75, num_bytes=20)
    silent = StepOverlap(time_s=0.0, communication_s=0.0, exposed_s=0.0, hidden_s=0.0, num_bytes=0)  # nothing was sent
    for overlap in (silent, unseen, unseen, silent):
        totals.add("dual", overlap)
    for overlap in (unseen, seen):
        totals.add("serial", overlap)
    assert totals.to_dict() == {
        "dual": {"time_s": 2.0, "communication_s": None, "exposed_s": None, "hidden_s": None, "num_bytes": 20},
        "serial": {"time_s": 3.0, "communication_s": 1.0, "exposed_s": 0.25, "hidden_s": 0.75, "num_bytes": 30},
    }


def test_totals_without_steps_are_empty_and_reading_them_changes_nothing():
    totals = OverlapTotals()
    assert totals.to_dict() == {}
    totals.to_dict()["dual"] = {}
    assert totals.to_dict() == {}
