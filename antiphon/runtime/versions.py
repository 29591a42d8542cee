"""What this process runs on: versions of the software, as a result's conditions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["versions"]

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str]:
    """Version by name; what is not there is left out. Never raises."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("antiphon", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found |= _cuda_versions()
    driver = _driver()
    if driver:
        found["driver"] = driver
    return found


def _cuda_versions() -> dict[str, str]:
    from antiphon.runtime.cuda_timing import cuda_versions  # only where torch was built for such a device

    try:
        return cuda_versions()
    except (RuntimeError, AttributeError, ImportError):
        return {}


def _driver() -> str:
    """Version of the NVIDIA driver; empty if there is none that says so."""
    try:
        words = _DRIVER_FILE.read_text().partition("\n")[0].split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")
