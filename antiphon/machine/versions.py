"""What this process runs on: versions of the software, as a result's conditions."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions(root: Path = Path("/")) -> dict[str, str]:
    """Version by name; what is not there is left out. Never raises. root: of the file system that knows the driver."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found |= {package: number for package in ("antiphon", "triton") if (number := installed(package))}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found |= _cuda_versions()
    if driver := _driver(root / "proc/driver/nvidia/version"):
        found["driver"] = driver
    return found


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cuda_versions() -> dict[str, str]:
    from antiphon.device.cuda import cuda_versions  # only where torch was built for such a device

    try:
        return cuda_versions()
    except Exception:  # a library that is broken is as good as absent
        return {}


def _driver(file: Path) -> str | None:
    """Version of the NVIDIA driver that the kernel has loaded."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"NVRM version:.*?\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None
