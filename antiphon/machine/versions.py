"""Versions of the software that this process runs on, to be recorded with a result."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from antiphon.machine.host import read_text


def versions(root: Path = Path("/")) -> dict[str, str]:
    """Version by name; what is absent is left out. Never raises. root: replaces / in the path of the driver's file."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found |= {package: number for package in ("antiphon", "triton") if (number := installed(package))}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found |= _cuda_versions()
    if driver := _driver(root / "proc/driver/nvidia/version"):
        found["driver"] = driver
    return found


def installed(distribution: str) -> str | None:
    """The version of an installed distribution; `None` if it is absent."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cuda_versions() -> dict[str, str]:
    from antiphon.device.cuda import cuda_versions  # only if torch was built with CUDA

    try:
        return cuda_versions()
    except Exception:  # a broken library counts as absent
        return {}


def _driver(file: Path) -> str | None:
    """Version of the NVIDIA driver that the kernel has loaded."""
    found = re.search(r"NVRM version:.*?\b(\d{3}\.\d+(?:\.\d+)?)\b", read_text(file) or "")
    return found[1] if found else None
