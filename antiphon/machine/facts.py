"""Facts about a machine: data only, so that every decision based on them can be tested with made-up facts.

`None` always means unknown: nothing is guessed. `probe` fills the facts in, and the transports judge them.
"""

from __future__ import annotations

from dataclasses import dataclass

UNLIMITED = -1
"""The value of a system limit that is not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The outcome of a trial. `detail` says what was tried or why it failed."""

    ok: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Version strings as each project writes them; `None` if absent. `backends`: collective backends, such as gloo."""

    python: str
    torch: str
    cuda: str | None = None
    driver: str | None = None
    nccl: str | None = None
    triton: str | None = None
    greenlet: str | None = None
    cuda_bindings: str | None = None
    backends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU that this process may use. `pci` is its address, such as 0000:18:00.0."""

    index: int
    name: str
    capability: str
    memory_total_bytes: int
    memory_free_bytes: int | None = None
    pci: str | None = None
    numa_node: int | None = None
    stream_memory_operations: Check = Check(ok=None)
    flushes_remote_writes: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Whether GPU `source` can access the memory of GPU `target`, and over which link, such as NV18, PIX or SYS."""

    source: int
    target: int
    access: bool | None
    link: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """What the CUDA driver reports. `problem` says why there are no devices."""

    devices: tuple[Gpu, ...] = ()
    peers: tuple[Peer, ...] = ()
    pinned_memory: Check = Check(ok=None)  # registering shared host memory with the driver
    pinned_bytes: int = 0  # size of that memory
    direct_launches: Check = Check(ok=None)  # launching kernels without Triton's launcher
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Memory, limits and system calls. `container` names the container runtime, "" outside a container.

    cgroup_free_bytes: what the tightest control group leaves; `UNLIMITED` without a limit.
    """

    container: str | None = None
    locked_memory_bytes: int | None = None
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    cgroup_limit_bytes: int | None = None
    cgroup_free_bytes: int | None = None
    shm_total_bytes: int | None = None
    shm_free_bytes: int | None = None
    memfd: Check = Check(ok=None)
    socket_descriptors: Check = Check(ok=None)  # sending a descriptor over a Unix socket
    pidfd_getfd: Check = Check(ok=None)  # taking a descriptor from a process that is not a child
    ptrace_scope: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """A NUMA node and its CPUs."""

    index: int
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numa:
    """The NUMA nodes of the host, and the CPUs on which this process may run."""

    nodes: tuple[NumaNode, ...] = ()
    affinity: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All facts about one machine. `environment`: variables that affect how ranks communicate, if set."""

    versions: Versions
    gpus: Gpus
    host: Host
    numa: Numa
    environment: dict[str, str]
