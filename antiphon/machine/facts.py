"""What a machine allows, as plain facts: data only, so that every judgement on them can be tested with made-up ones.

`None` always means unknown: a fact that could not be found out is never guessed. `probe` fills them in,
the transports judge them.
"""

from __future__ import annotations

from dataclasses import dataclass

UNLIMITED = -1
"""A limit of the system that is not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Whether something that was tried works; `detail` says what was tried or why it failed."""

    ok: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Versions as their makers write them; `None` if absent. `backends`: of collectives, such as gloo and nccl."""

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
    """One GPU that this process may use. `pci` is such as 0000:18:00.0."""

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
    """Whether GPU `source` can reach the memory of GPU `target`, and over what, such as NV18, PIX or SYS."""

    source: int
    target: int
    access: bool | None
    link: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """What the CUDA driver says. `problem` says why there are no devices."""

    devices: tuple[Gpu, ...] = ()
    peers: tuple[Peer, ...] = ()
    pinned_memory: Check = Check(ok=None)  # shared host memory was registered with the driver ...
    pinned_bytes: int = 0  # ... as much as this
    direct_launches: Check = Check(ok=None)  # kernels are launched without Triton's own call
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Memory, limits and system calls. `container` names the kind of container, "" outside of one.

    cgroup_free_bytes: what the tightest control group leaves; `UNLIMITED` without one.
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
    socket_descriptors: Check = Check(ok=None)  # a descriptor sent over a Unix socket
    pidfd_getfd: Check = Check(ok=None)  # a descriptor taken from a process that is not a child
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
    """Everything about one machine. `environment`: the variables that change how ranks communicate, if set."""

    versions: Versions
    gpus: Gpus
    host: Host
    numa: Numa
    environment: dict[str, str]
