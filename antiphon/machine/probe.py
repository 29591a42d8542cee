"""Examines this machine before anything starts: many small probes that fill one `Facts`.

No probe raises and none hangs: what might hang runs in a process with a time limit. The calling process gets no CUDA
context. Each transport decides for itself what a fact means for it.

    facts = examine_machine()
    for found in usable_transports(facts, ranks=2, device_kind="cuda", peer_access=True): ...
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from antiphon.core.lines import split_lines
from antiphon.machine.facts import Facts, Gpus, Versions
from antiphon.machine.host import numa_node_of, probe_host, probe_numa, read_text, run_limited
from antiphon.machine.versions import installed, versions

_ROOT = Path("/")
_MIB = 1 << 20
_PINNED_TRIAL_BYTES = (16 * _MIB, 256 * _MIB)  # minimum and maximum
_TOOL_LIMIT_S = 10.0
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NCCL_P2P_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_SHM_DISABLE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def examine_machine(*, time_limit_s: float = 60.0) -> Facts:
    """Everything that can be found out within about `time_limit_s` seconds. Never raises."""
    host = probe_host()
    gpus = probe_gpus_apart(_trial_bytes(host.locked_memory_bytes), time_limit_s)
    driver, gpu_order = _ask_nvidia_smi() if gpus.devices else (None, {})
    if len(gpus.devices) > 1:
        gpus = _with_links(gpus, gpu_order)
    devices = tuple(replace(device, numa_node=numa_node_of(device.pci)) for device in gpus.devices)
    return Facts(
        versions=probe_versions(driver),
        gpus=replace(gpus, devices=devices),
        host=host,
        numa=probe_numa(),
        environment={name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
    )


# ---- versions


def probe_versions(driver: str | None = None, root: Path = _ROOT) -> Versions:
    """Versions of this process's software. driver: the version of the NVIDIA driver, if it is already known."""
    found = versions(root)
    return Versions(
        python=found["python"],
        torch=found["torch"],
        cuda=found.get("cuda"),
        driver=driver or found.get("driver"),
        nccl=found.get("nccl"),
        triton=found.get("triton"),
        greenlet=installed("greenlet"),
        cuda_bindings=installed("cuda-bindings"),
        backends=_backends(),
    )


def _backends() -> tuple[str, ...]:
    if not torch.distributed.is_available():
        return ()
    known = torch.distributed.Backend.backend_list  # includes those of plug-ins; two of torch's own transfer nothing
    return tuple(
        name for name in known if name not in ("undefined", "fake") and torch.distributed.is_backend_available(name)
    )


# ---- GPUs


def nvidia_gpus(root: Path = _ROOT) -> int:
    """Number of NVIDIA GPUs on the PCI bus, whether or not torch and the driver can use them; 0 if it is unknown."""
    return sum(_is_nvidia_gpu(device) for device in root.glob("sys/bus/pci/devices/*"))


def _is_nvidia_gpu(device: Path) -> bool:
    vendor, kind = (read_text(device / name) or "" for name in ("vendor", "class"))
    return vendor.strip() == "0x10de" and kind.startswith(
        "0x03"
    )  # display controller, also if it has no display output


def probe_gpus_apart(pinned_bytes: int, time_limit_s: float) -> Gpus:
    """Run `cuda.probe_gpus` in its own process."""
    if torch.version.cuda is None:
        return Gpus(problem="this torch build has no CUDA support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    command = [sys.executable, "-P", "-m", "antiphon.machine.cuda", str(pinned_bytes)]
    printed, problem = run_limited(command, time_limit_s, environment)
    if printed is None:
        return Gpus(problem=f"unknown: asking the CUDA driver {problem}")
    try:
        return msgspec.json.decode(printed.strip().rpartition("\n")[2], type=Gpus)
    except msgspec.MsgspecError as error:
        return Gpus(problem=f"unknown: the CUDA driver's answer cannot be parsed ({error})")


def _trial_bytes(locked_memory_bytes: int | None) -> int:
    """More than the limit on locked memory if that is affordable: success shows that the limit does not apply."""
    smallest, largest = _PINNED_TRIAL_BYTES
    return min(max(smallest, 2 * (locked_memory_bytes or 0)), largest)


def _with_links(gpus: Gpus, gpu_order: dict[str, int]) -> Gpus:
    """Add the link of each pair of GPUs, as far as nvidia-smi reports it."""
    printed, _ = run_limited(["nvidia-smi", "topo", "-m"], _TOOL_LIMIT_S)
    links = parse_topology(printed or "")
    order = {device.index: gpu_order.get(device.pci or "") for device in gpus.devices}
    peers = []
    for peer in gpus.peers:
        source, target = order[peer.source], order[peer.target]
        link = None if source is None or target is None else links.get((source, target))
        peers.append(replace(peer, link=link))
    return replace(gpus, peers=tuple(peers))


def _ask_nvidia_smi() -> tuple[str | None, dict[str, int]]:
    """The driver's version, and the number that nvidia-smi gives each GPU, by PCI address."""
    query = ["nvidia-smi", "--query-gpu=index,pci.bus_id,driver_version", "--format=csv,noheader"]
    printed, _ = run_limited(query, _TOOL_LIMIT_S)
    return parse_gpu_list(printed or "")


def parse_gpu_list(printed: str) -> tuple[str | None, dict[str, int]]:
    """Parse lines such as `0, 00000000:18:00.0, 580.95.05`; other lines are ignored."""
    rows = re.findall(r"^\s*(\d+), *([0-9A-Fa-f]+):([0-9A-Fa-f:.]+), *(\S+)\s*$", printed, flags=re.MULTILINE)
    order = {f"{int(domain, 16):04x}:{rest.lower()}": int(index) for index, domain, rest, _ in rows}
    return (rows[0][3] if rows else None), order


def parse_topology(printed: str) -> dict[tuple[int, int], str]:
    """The links between GPUs in the table of `nvidia-smi topo -m`."""
    rows = [line.split("\t") for line in split_lines(re.sub(r"\x1b\[[0-9;]*m", "", printed))]
    heads = next((row for row in rows if "GPU0" in (cell.strip() for cell in row[1:])), [])
    columns = {place: int(found[1]) for place, cell in enumerate(heads) if (found := _gpu_name(cell))}
    links = {}
    for row in rows:
        source = _gpu_name(row[0])
        for place, target in columns.items():
            if source and place < len(row) and int(source[1]) != target:
                links[int(source[1]), target] = row[place].strip()
    return links


def _gpu_name(cell: str) -> re.Match[str] | None:
    return re.fullmatch(r"GPU(\d+)", cell.strip())
