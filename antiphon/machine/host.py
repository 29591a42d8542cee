"""Probes of the host: memory, limits, system calls, containers, NUMA.

Nothing here knows about GPUs. No probe raises; what might hang runs in a process with a time limit. `root` replaces /
in the paths that are read.
"""

from __future__ import annotations

import mmap
import os
import re
import resource
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from antiphon.core.lines import split_lines
from antiphon.machine.facts import UNLIMITED, Check, Host, Numa, NumaNode

_ROOT = Path("/")
_CHILD_LIMIT_S = 10.0
_NO_LIMIT_FROM = 1 << 60  # version 1 of control groups reports a very large number instead of "no limit"
_TAKE_DESCRIPTOR = """
import ctypes, os, sys
SYS_pidfd_getfd = 438  # on every architecture
process = os.pidfd_open(int(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
taken = libc.syscall(SYS_pidfd_getfd, process, int(sys.argv[2]), 0)
print("taken" if taken >= 0 else os.strerror(ctypes.get_errno()))
"""


def probe_host(root: Path = _ROOT) -> Host:
    """Memory, limits and system calls of this process."""
    memory = _memory_info(root)
    limit_bytes, free_bytes = _cgroup_memory(root)
    shm_total_bytes, shm_free_bytes = _room(root / "dev/shm")
    return Host(
        container=_container(root),
        locked_memory_bytes=_locked_memory(),
        memory_total_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        cgroup_limit_bytes=limit_bytes,
        cgroup_free_bytes=free_bytes,
        shm_total_bytes=shm_total_bytes,
        shm_free_bytes=shm_free_bytes,
        memfd=probe_memfd(),
        socket_descriptors=probe_socket_descriptors(),
        pidfd_getfd=probe_pidfd_getfd(),
        ptrace_scope=_number(read_text(root / "proc/sys/kernel/yama/ptrace_scope")),
    )


def obtainable_memory(root: Path = _ROOT) -> int | None:
    """Bytes that processes here can still obtain; `None` if the system does not report it. Starts no process.

    A control group counts with its whole limit: most of its usage is page cache, which the kernel reclaims.
    """
    limits = (_memory_info(root).get("MemAvailable"), _cgroup_memory(root)[0])
    return min((limit for limit in limits if limit is not None and limit != UNLIMITED), default=None)


def _locked_memory() -> int | None:
    try:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    except (AttributeError, OSError, ValueError):
        return None
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _memory_info(root: Path) -> dict[str, int]:
    rows = re.findall(r"^(\w+): +(\d+) kB$", read_text(root / "proc/meminfo") or "", flags=re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in rows}


def _room(folder: Path) -> tuple[int | None, int | None]:
    """Total and free bytes of the file system at `folder`."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None, None
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _cgroup_memory(root: Path) -> tuple[int | None, int | None]:
    """Limit and free bytes of the tightest control group around this process; `UNLIMITED` without a limit."""
    membership = read_text(root / "proc/self/cgroup")
    if membership is None:
        return None, None
    tightest = (UNLIMITED, UNLIMITED)
    for line in split_lines(membership):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top, limit_name, used_name = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            limit, used = (_number(read_text(top / folder / name)) for name in (limit_name, used_name))
            if limit is None or limit >= _NO_LIMIT_FROM:  # None: "max"
                continue
            free = max(0, limit - (used or 0))
            if tightest[1] == UNLIMITED or free < tightest[1]:
                tightest = (limit, free)
    return tightest


def _container(root: Path) -> str | None:
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / "var/run/secrets/kubernetes.io").exists():
        return "kubernetes"
    membership = read_text(root / "proc/1/cgroup")
    if membership is None:
        return None
    found = re.search(r"docker|kubepods|containerd|lxc", membership)
    return found[0].replace("kubepods", "kubernetes") if found else ""


def probe_memfd() -> Check:
    """Create anonymous shared memory and write to it."""
    try:
        descriptor = os.memfd_create("antiphon-probe")
    except (AttributeError, OSError) as error:
        return Check(ok=False, detail=f"memfd_create failed: {error}")
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        with mmap.mmap(descriptor, mmap.PAGESIZE) as memory:
            memory[:1] = b"a"
    except (OSError, ValueError) as error:
        return Check(ok=False, detail=f"memory of memfd_create cannot be mapped: {error}")
    finally:
        os.close(descriptor)
    return Check(ok=True, detail="shared memory was created and written")


def probe_socket_descriptors() -> Check:
    """Send a descriptor over a Unix socket, as PyTorch's symmetric memory does."""
    try:
        here, there = socket.socketpair(socket.AF_UNIX)
        with here, there:
            there.settimeout(1.0)
            socket.send_fds(here, [b"a"], [here.fileno()])
            _, received, _, _ = socket.recv_fds(there, 1, 1)
            for descriptor in received:
                os.close(descriptor)
    except (AttributeError, OSError) as error:
        return Check(ok=False, detail=f"sending a descriptor over a Unix socket failed: {error}")
    return Check(ok=len(received) == 1, detail="a descriptor was sent over a Unix socket")


def probe_pidfd_getfd() -> Check:
    """Let a child take a descriptor of this process.

    A child has no more rights over its parent than one rank has over another.
    """
    try:
        descriptor = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        return Check(ok=None, detail=str(error))
    try:
        command = [sys.executable, "-I", "-S", "-c", _TAKE_DESCRIPTOR, str(os.getpid()), str(descriptor)]
        printed, problem = run_limited(command, _CHILD_LIMIT_S)
    finally:
        os.close(descriptor)
    if printed is None:
        return Check(ok=None, detail=f"trying pidfd_getfd {problem}")
    answer = printed.strip()
    ok = answer == "taken"
    return Check(ok=ok, detail="a descriptor was taken from another process" if ok else answer)


# ---- NUMA


def probe_numa(root: Path = _ROOT) -> Numa:
    """The host's NUMA nodes and this process's CPUs; empty if the system does not report them."""
    nodes = []
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        cpus = parse_cpu_list(read_text(folder / "cpulist") or "")
        nodes.append(NumaNode(index=int(folder.name.removeprefix("node")), cpus=cpus))
    try:
        affinity = tuple(sorted(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        affinity = ()
    return Numa(nodes=tuple(sorted(nodes, key=lambda node: node.index)), affinity=affinity)


def numa_node_of(pci: str | None, root: Path = _ROOT) -> int | None:
    """The NUMA node of a PCI device; `None` if the system does not report it."""
    node = _number(read_text(root / "sys/bus/pci/devices" / (pci or "") / "numa_node")) if pci else None
    return None if node is None or node < 0 else node


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The numbers in a list such as `0-3,8`."""
    cpus: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)


# ---- reading and running


def run_limited(
    command: list[str], limit_s: float, environment: dict[str, str] | None = None
) -> tuple[str | None, str]:
    """What `command` printed, or `None` and what went wrong. Returns even if the process cannot be killed."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
    except OSError as error:
        return None, f"failed: {error}"
    try:
        printed, complaint = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # it hangs inside the kernel: abandon it
            process.communicate(timeout=1.0)
        return None, f"did not end within {limit_s:g} s"
    if process.returncode != 0:
        last_line = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        return None, f"ended with code {process.returncode}: {last_line}".rstrip(": ")
    return printed.decode(errors="replace"), ""


def read_text(path: Path) -> str | None:
    """The text of a file; `None` if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    try:
        return int(text) if text else None
    except ValueError:
        return None
