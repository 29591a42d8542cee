"""Runs functions on lanes, round-robin from lane 0, in one host thread.

The caller is the hub. It resumes lane 0 until that lane switches, then lane 1, and so on, skipping lanes that have
ended. The order of operations depends only on the functions, never on timing.

    hub ─► lane 0 ──switch─► hub ─► lane 1 ──switch─► hub ─► lane 0 ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from greenlet import GreenletExit, greenlet

from antiphon.core.errors import LaneError
from antiphon.device.cpu import CpuStreams
from antiphon.device.device import Streams
from antiphon.runtime.hook import EventKind, Hook, Recorder
from antiphon.runtime.lane import Lane, LaneCancelled, RunState, current, running_lane
from antiphon.runtime.torch_state import TorchState
from antiphon.runtime.traps import check_lane_state

T = TypeVar("T")

_MAX_CANCEL_SWITCHES = 100


def run_lanes(
    functions: Sequence[Callable[[], T]],
    *,
    streams: Streams | None = None,
    recorder: Recorder | None = None,
) -> list[T]:
    """Run every function on its own lane and return the results in order.

    functions: any number; none gives an empty list. A single function is called directly, without a greenlet.
    streams: the compute and comm streams; by default the CPU's.
    recorder: receives the events of the run.

    Each lane gets a copy of the caller's context variables. Lanes may switch a different number of times and end early.
    If a lane raises, the other lanes are cancelled at their switch (`LaneCancelled`, a `BaseException`), all pendings
    are abandoned, and the exception is raised here once, with its own traceback.
    Raises `LaneError` for a run inside one of several lanes, for a pending that was not finished, and for torch state
    that a lane left changed.
    """
    streams = streams if streams is not None else CpuStreams()
    outer = running_lane()
    if outer is not None and outer.greenlet is not None:
        raise LaneError(f"run_lanes was called inside lane {outer.index}", limit="lanes cannot be nested")
    run = RunState(
        num_lanes=len(functions),
        streams=streams,
        hook=Hook(recorder),
        torch_state=TorchState.read(streams.owner.autocast_types),
    )
    lanes: list[Lane] = []
    for index in range(len(functions)):
        lanes.append(Lane(index=index, run=run, previous=lanes[-1] if lanes else None))
    try:
        if len(functions) == 1:
            results = [copy_context().run(_lane_main, lanes[0], functions[0])]
        else:
            results = _run_round_robin(lanes, functions)
    except BaseException as error:
        _release(lanes, streams, error)
        raise
    streams.join()
    return results


def _run_round_robin(lanes: list[Lane], functions: Sequence[Callable[[], T]]) -> list[T]:
    results: dict[int, T] = {}

    def body(lane: Lane, function: Callable[[], T]) -> None:
        results[lane.index] = _lane_main(lane, function)

    greenlets = []
    for lane, function in zip(lanes, functions, strict=True):
        lane.greenlet = greenlet(partial(body, lane, function))
        lane.greenlet.gr_context = copy_context()
        greenlets.append(lane.greenlet)
    try:
        while not all(lane.done for lane in lanes):
            for lane, lane_greenlet in zip(lanes, greenlets, strict=True):
                if not lane.done:
                    ended = lane_greenlet.switch()
                    if isinstance(ended, GreenletExit):  # greenlet returns this exception instead of raising it
                        raise ended
    except BaseException as error:
        _cancel(lanes, error)
        raise
    finally:
        for lane in lanes:
            lane.greenlet = None  # breaks a reference cycle: the greenlet's context holds the lane
    return [results[index] for index in range(len(lanes))]


def _lane_main(lane: Lane, function: Callable[[], T]) -> T:
    current.set(lane)
    lane.hook.emit(EventKind.START, lane.index, "")
    try:
        result = function()
        if lane.done:  # given up while it was cancelled: it ends whenever its greenlet is collected, outside the run
            return result
        check_lane_state(lane, "ends")
        if lane.pendings:
            labels = ", ".join(repr(pending.label) for pending in lane.pendings.values())
            raise LaneError(f"lane {lane.index} ended without finishing pending {labels}", remedy="call finish on it")
        return result
    finally:
        lane.done = True
        lane.hook.emit(EventKind.END, lane.index, "")


def _cancel(lanes: list[Lane], error: BaseException) -> None:
    """Cancel every lane that has started and not ended. Errors meanwhile become notes of `error`."""
    for lane in lanes:
        if lane.done or lane.greenlet is None or not lane.greenlet:
            continue  # ended, or never started
        for _ in range(_MAX_CANCEL_SWITCHES):
            try:
                lane.greenlet.throw(LaneCancelled())
            except LaneCancelled:
                break
            except BaseException as second:
                error.add_note(f"lane {lane.index} also failed while it was cancelled: {second!r}")
                break
            if not lane.greenlet:  # it has ended
                break
        else:
            lane.done = True
            error.add_note(f"lane {lane.index} did not end within {_MAX_CANCEL_SWITCHES} cancellations")


def _release(lanes: list[Lane], streams: Streams, error: BaseException) -> None:
    """Abandon all pendings and wait for the comm streams. Errors meanwhile become notes of `error`."""
    pendings = [pending for lane in lanes for pending in lane.pendings.values()]
    for release in (*(pending.abandon for pending in pendings), streams.join):
        try:
            release()
        except Exception as second:
            error.add_note(f"releasing also failed: {second!r}")
