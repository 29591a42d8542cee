"""The device of a rank behind a few functions: which, how much memory, how much at most. Knows no tensors of ours.

    device = device_for_rank("cuda", rank)
    activate(device)
    reset_peak(device)
    ...                                # run something
    used = peak_bytes(device)          # of all memory of the device, whoever took it

CUDA's side is in `cuda_device`, loaded only where there is such a device.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch

DEVICE_KINDS = ("cpu", "cuda")

_ROOT = Path("/")


class DeviceMemory(NamedTuple):
    """Bytes of a device: not used by anybody, and in all."""

    free_bytes: int
    total_bytes: int


def num_devices(kind: str) -> int:
    """Devices of a kind that this process may use; starts nothing on them. The CPU counts as one."""
    if kind == "cpu":
        return 1
    from antiphon.device import cuda_device

    return cuda_device.num_devices()


def nvidia_gpus(root: Path = _ROOT) -> int:
    """NVIDIA GPUs on this machine's PCI bus, whatever torch and the driver can do with them; 0 where nobody says.

    root: of the file system that knows them.
    """
    return sum(_is_nvidia_gpu(device) for device in root.glob("sys/bus/pci/devices/*"))


def _is_nvidia_gpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")  # a display controller, which those without a display are too


def device_for_rank(kind: str, rank: int) -> torch.device:
    """The device of a rank: ranks take CUDA devices by turns, and share the CPU."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, rank % num_devices(kind))


def activate(device: torch.device) -> None:
    """Make it the current device of this process; float32 products on it are exact from now on (no TF32)."""
    if device.type != "cpu":
        from antiphon.device import cuda_device

        cuda_device.activate(device)


def synchronize(device: torch.device) -> None:
    """Block the host until all that was launched on the device is done. On the CPU nothing is under way."""
    if device.type != "cpu":
        from antiphon.device import cuda_device

        cuda_device.synchronize(device)


def memory(device: torch.device) -> DeviceMemory:
    """What is free now and what there is, for all processes together."""
    if device.type == "cpu":
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        free_pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
        return DeviceMemory(free_pages * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes)
    from antiphon.device import cuda_device

    return DeviceMemory(*cuda_device.memory(device))


def release_unused(device: torch.device) -> None:
    """Give memory that no tensor uses back to the device, for other processes and libraries; waits for the device."""
    if device.type != "cpu":
        from antiphon.device import cuda_device

        cuda_device.release_unused(device)


def reset_peak(device: torch.device) -> None:
    """`release_unused`, and let `peak_bytes` count from now on. The CPU cannot start afresh."""
    if device.type != "cpu":
        from antiphon.device import cuda_device

        cuda_device.reset_peak(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory of the device in use since `reset_peak`: this process's peak, and what others hold now.

    On the CPU the largest resident size that this process ever had.
    """
    if device.type == "cpu":
        import resource  # not on every system

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024
    from antiphon.device import cuda_device

    return cuda_device.peak_bytes(device)


def describe(device: torch.device) -> str:
    """The device in words, such as "NVIDIA H200" or "CPU (x86_64)"."""
    if device.type == "cpu":
        return f"CPU ({platform.machine()})"
    from antiphon.device import cuda_device

    return cuda_device.describe(device)
