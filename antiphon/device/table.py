"""The one table of kinds of devices, and how a device is found in it.

Adding a kind takes one file with a subclass of `Device` and one row here. A class is imported when a device of its kind
is first asked for, so that a kind whose libraries are missing costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType

import torch

from antiphon.core.errors import unknown_value
from antiphon.device.device import Device, Streams

DEVICES = MappingProxyType(
    {
        "cpu": "antiphon.device.cpu:CpuDevice",
        "cuda": "antiphon.device.cuda:CudaDevice",
        "xpu": "antiphon.device.generic:GenericDevice",
        "npu": "antiphon.device.generic:GenericDevice",
        "generic": "antiphon.device.generic:GenericDevice",
        "generic:cuda": "antiphon.device.generic:GenericDevice",
        "generic:cpu": "antiphon.device.generic_cpu:PretendedDevice",
    }
)
"""Kind, and the class of its devices."""


def find_device(kind: str, index: int = 0, *, option: str = "device") -> Device:
    """The device of that kind and index, made without touching hardware.

    option: where the user named the kind, for the error. Raises `OptionError` for a kind that is not in the table.
    """
    path = DEVICES.get(kind)
    if path is None:
        raise unknown_value(option, kind, ("auto", *DEVICES))
    module, _, name = path.partition(":")
    device: Device = getattr(import_module(module), name)(kind, index)
    return device


def device_of(place: torch.device | Device) -> Device:
    """The owner of a `torch.device`: the device of the kind that is called as its type is. A `Device` is itself."""
    if isinstance(place, Device):
        return place
    device = find_device(place.type, place.index or 0)
    return device if place.index is not None else find_device(place.type, device.current_index())


def rank_device(kind: str, rank: int) -> Device:
    """The device of a rank: ranks take devices by turns, and share the CPU."""
    device = find_device(kind)
    return find_device(kind, rank % device.count())


# ---- short forms of the public face


def num_devices(kind: str) -> int:
    """Devices of a kind that this process may use; starts nothing on them. The CPU counts as one."""
    return find_device(kind).count()


def device_for_rank(kind: str, rank: int) -> torch.device:
    """The `torch.device` of a rank's tensors; see `rank_device`."""
    return rank_device(kind, rank).torch_device


def activate(device: torch.device | Device) -> None:
    """Make it the current device of this process; float32 products on it are exact from then on (no TF32)."""
    device_of(device).activate()


def streams_for(device: torch.device | Device) -> Streams:
    """The streams of a device; on a GPU the stream that is current becomes the compute stream."""
    return device_of(device).streams()
