"""The table of device kinds, and the lookup of devices in it.

A new kind takes one file with a subclass of `Device` and one row here. Its class is imported on first use, so a kind
whose libraries are missing does no harm.
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
"""Kind of device -> module and class."""


def find_device(kind: str, index: int = 0, *, option: str = "device") -> Device:
    """The device of that kind and index. Touches no hardware.

    option: where the user named the kind, for the error. Raises `OptionError` for a kind that is not in the table.
    """
    path = DEVICES.get(kind)
    if path is None:
        raise unknown_value(option, kind, ("auto", *DEVICES))
    module, _, name = path.partition(":")
    device: Device = getattr(import_module(module), name)(kind, index)
    return device


def device_of(place: torch.device | Device) -> Device:
    """The device whose kind is the type of a `torch.device`; a `Device` is returned as it is."""
    if isinstance(place, Device):
        return place
    device = find_device(place.type, place.index or 0)
    return device if place.index is not None else find_device(place.type, device.current_index())


def rank_device(kind: str, rank: int) -> Device:
    """The device of a rank. Ranks are assigned to devices round-robin; all of them share the CPU."""
    device = find_device(kind)
    return find_device(kind, rank % device.count())


# ---- shortcuts for the public API


def num_devices(kind: str) -> int:
    """Number of devices of a kind that this process may use, without initializing them. The CPU counts as one."""
    return find_device(kind).count()


def device_for_rank(kind: str, rank: int) -> torch.device:
    """The `torch.device` of a rank's tensors; see `rank_device`."""
    return rank_device(kind, rank).torch_device


def activate(device: torch.device | Device) -> None:
    """Make it the current device of this process, and turn TF32 off so that float32 GEMMs keep their precision."""
    device_of(device).activate()


def streams_for(device: torch.device | Device) -> Streams:
    """The streams of a device. On a GPU the current stream becomes the compute stream."""
    return device_of(device).streams()
