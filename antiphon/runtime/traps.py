"""The traps: the only functions that hand the host thread from one lane to another.

In model code look for `finish` and `switch`: between two of them no other lane runs.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from greenlet import getcurrent

from antiphon.core.errors import LaneError
from antiphon.runtime.hook import EventKind
from antiphon.runtime.lane import Lane, running_lane
from antiphon.runtime.pending import Pending
from antiphon.runtime.torch_state import TorchState

T = TypeVar("T")


def switch(label: str = "") -> None:
    """Hand the host thread to the next lane. Returns when it is this lane's turn again.

    Outside lanes and in a run of one lane it returns at once. `label` names the switch in recordings and errors.
    Raises `LaneError` if the lane left torch's thread-wide state changed or is not on the compute stream.
    """
    lane = running_lane()
    if lane is None or lane.greenlet is None:
        return
    check_lane_state(lane, f"switches at {label!r}")
    if getcurrent() is not lane.greenlet:
        raise LaneError(
            f"switch({label!r}) was called in a greenlet inside lane {lane.index}", remedy="call it in the lane itself"
        )
    lane.hook.emit(EventKind.SWITCH_OUT, lane.index, label)
    lane.greenlet.parent.switch()
    lane.hook.emit(EventKind.SWITCH_IN, lane.index, label)


def finish(pending: Pending[T]) -> T:
    """Switch once, then wait for `pending` and return its result. Never polls."""
    switch(pending.label)
    return pending.wait()


def current_lane() -> int:
    """Index of the running lane; 0 outside lanes."""
    lane = running_lane()
    return 0 if lane is None else lane.index


def num_lanes() -> int:
    """Number of lanes in the current run; 1 outside lanes."""
    lane = running_lane()
    return 1 if lane is None else lane.run.num_lanes


def order_point(key: Hashable) -> None:
    """Pass `key`, after asserting that the previous lane has passed it as many times as this lane now, or has ended.

    Attention calls it once it has queued its key and value writes of a layer: a request that straddles the cut reads
    in lane i what lane i-1 wrote in the same step.
    """
    lane = running_lane()
    if lane is None:
        return
    count = lane.points_passed.get(key, 0) + 1
    before = lane.previous
    if before is not None and not before.done and before.points_passed.get(key, 0) < count:
        raise LaneError(
            f"lane {lane.index} reached {key!r} before lane {before.index}",
            limit=f"its requests may read what lane {before.index} has not written",
            remedy="give every lane the same switches before this point",
        )
    lane.points_passed[key] = count


def check_lane_state(lane: Lane, doing: str) -> None:
    """Raise `LaneError` if torch's state has changed since the start, or if another stream is current."""
    changes = lane.run.torch_state.changes(TorchState.read(lane.run.streams.owner.autocast_types))
    if changes:
        raise LaneError(
            f"lane {lane.index} {doing} with torch state changed ({changes})",
            limit="all lanes of the thread share this state",
            remedy="set it once, outside run_lanes",
        )
    if not lane.run.streams.on_compute_stream():
        raise LaneError(
            f"lane {lane.index} {doing} on a stream other than the compute stream",
            remedy="leave the stream context first",
        )
