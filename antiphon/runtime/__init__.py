"""Lanes: run several functions in one host thread, which changes lanes only at `switch` and `finish`.

This package stands alone: it knows nothing of batches, models or transports. It runs callables and orders streams.

    from antiphon.runtime import finish, run_lanes

    def half(x):
        sent = transport.dispatch(x, ids, weights)  # a Pending: the data is in flight
        shared = shared_experts(x)                  # hides part of the communication
        rows = finish(sent)                         # the other lane computes here
        ...

    outputs = run_lanes([lambda: half(x0), lambda: half(x1)])

One thread, two lanes; `=` is computation, `.` is communication:

    lane 0   ==dispatch.......==expert==combine.......==
    lane 1             ==dispatch......==expert==combine.......==
    time  ------------------------------------------------------->
"""

from antiphon.core.errors import LaneError
from antiphon.device.cpu import CpuStreams
from antiphon.device.cuda import CudaStreams
from antiphon.device.device import Device, Event, Streams
from antiphon.device.table import activate, device_for_rank, find_device, num_devices, streams_for
from antiphon.runtime.hook import EventKind, LaneEvent, Recorder
from antiphon.runtime.lanes import run_lanes
from antiphon.runtime.pending import Pending
from antiphon.runtime.traps import current_lane, finish, num_lanes, order_point, switch

__all__ = [
    "CpuStreams",
    "CudaStreams",
    "Device",
    "Event",
    "EventKind",
    "LaneError",
    "LaneEvent",
    "Pending",
    "Recorder",
    "Streams",
    "activate",
    "current_lane",
    "device_for_rank",
    "find_device",
    "finish",
    "num_devices",
    "num_lanes",
    "order_point",
    "run_lanes",
    "streams_for",
    "switch",
]
