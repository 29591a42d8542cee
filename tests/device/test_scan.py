"""Searches the code for comparisons of device kinds and for calls of vendor-specific APIs outside the device room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import antiphon
from antiphon.device.table import DEVICES

PACKAGE = Path(antiphon.__file__).parent
KINDS = set(DEVICES) - {"generic"} | {"mps", "hip"}
APIS = {"cuda", "accelerator", "xpu", "npu"}

KNOWS_CUDA = (
    "device/",
    "machine/",  # asks what there is
    "kernels/fused/",
    "kernels/dispatch.py",  # takes tensors on CUDA devices to the fused kernels
    "kernels/expert_choice.py",  # chooses kernels by compute capability
    "kernels/expert_tuning.py",  # times kernels in graphs
    "kernels/attention/",  # backends for one maker's devices say what they need
    "comm/slab/copy_engine.py",
    "comm/slab/host_staged.py",
    "comm/collective/nccl.py",
    "comm/collective/nccl_zero_cta.py",
)
COMPARES = (
    "kernels/attention/",  # refusals of backends for CUDA devices
    "kernels/fused/",  # size their grids for the device, or for the interpreter
    "machine/advice.py",  # of NVIDIA's driver, to those who run on it
    "cli/doctor.py",
)


def asked(source: str) -> Iterator[str]:
    """`cuda` for a use of one maker's API, `compares` for a comparison with the name of a kind, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            if node.attr == "is_cuda" or (of_torch and node.attr in APIS):
                yield f"cuda {node.lineno}"
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {side.value for side in sides if isinstance(side, ast.Constant)} & KINDS
            types = [s for s in sides if isinstance(s, ast.Attribute) and s.attr == "type" and _is_device(s.value)]
            if names or types:
                yield f"compares {node.lineno}"


def _is_device(node: ast.expr) -> bool:
    return "device" in (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", ""))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("device.type == other", ["compares 1"]),
        ("x.device.type != y.device.type", ["compares 1"]),
        ("kind == 'cuda'", ["compares 1"]),
        ("torch.cuda.synchronize()", ["cuda 1"]),
        ("x.is_cuda", ["cuda 1"]),
        ("torch.accelerator.synchronize()", ["cuda 1"]),
        ("field.type == 'bool'", []),
        ("device.own_memory", []),
        ("torch.version.cuda", []),
    ],
)
def test_the_search_finds_what_it_is_for(line: str, found: list[str]) -> None:
    assert list(asked(line)) == found


def test_only_few_files_know_which_kind_a_device_is() -> None:
    allowed = {"cuda": KNOWS_CUDA, "compares": COMPARES}
    offenders, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for what in asked(path.read_text()):
            start = next((start for start in allowed[what.split()[0]] if name.startswith(start)), None)
            if start is None:
                offenders.append(f"{name}: {what}")
            used.add((what.split()[0], start))
    assert offenders == []
    unused = {(what, start) for what, starts in allowed.items() for start in starts} - used
    assert unused == set(), "files that may know it and do not"
