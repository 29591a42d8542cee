"""Which transports a machine allows, why not the others, and what would help: pure functions of `Facts`.

A transport is called usable only where everything that it needs has been shown to work. What is unknown is said to be
unknown, and a transport that depends on it is not usable; naming it tries it all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from antiphon.comm.row_format import RowFormat
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import DEFAULT_MAX_TOKENS
from antiphon.core.errors import OptionError, unknown_value
from antiphon.kernels.dispatch import LAUNCH_COST, LAUNCH_REMEDY
from antiphon.machine.facts import UNLIMITED, Check, Facts, Peer, peers_forbidden

_LARGE_SHAPE = ExpertShape(num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16)
"""Of DeepSeek-V3: the largest rows that are usual."""

_NCCL_SEGMENT_BYTES = 10 << 20
"""What NCCL allocates in /dev/shm for one connection; less is not enough for any."""

_NCCL_SHM_BYTES = 1 << 30
"""What NCCL's documentation asks for in containers."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Something that is wrong or slow, and what would mend it ("" if nothing would)."""

    fact: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Usability:
    """Whether a transport can be used, why (not), and what would help; a usable one may have a remedy too."""

    name: str
    usable: bool
    reason: str
    remedy: str = ""


def usable_transports(
    facts: Facts, *, ranks: int, device_kind: str, peer_access: bool = True, shared_bytes: int | None = None
) -> list[Usability]:
    """One `Usability` for every transport, for `ranks` ranks of one host, each with a device of its own.

    device_kind: "cpu" or "cuda". peer_access: False under `--no-peer-access`; `NCCL_P2P_DISABLE` in the facts implies
    it. shared_bytes: host memory that slabs between processes need; by default `slab_bytes` of a large model for
    `host-staged`, which pins all of it, and not asked for by `shared-memory`, which takes only what it uses.

    Raises `OptionError` for no ranks or an unknown kind of device.
    """
    if ranks < 1:
        raise OptionError(f"ranks={ranks} is out of range; use an integer of at least 1")
    if device_kind not in ("cpu", "cuda"):
        raise unknown_value("device_kind", device_kind, ("cpu", "cuda"))
    if shared_bytes is None:
        shared_bytes = slab_bytes(ranks) if device_kind == "cuda" else 0
    judge = _Judge(facts, ranks, device_kind, peer_access, shared_bytes)
    judged = [judge.local()]
    judged += [judge.collectives(name) for name in ("allgather", "alltoall")]
    judged += [judge.copy_engine(), judge.host_staged(), judge.shared_memory()]
    inner = [found.name for found in judged if found.usable]
    if inner:
        reason = f"around {' or '.join(inner)}, only slower: for tests and planning"
        return [*judged, Usability("simulated", True, reason)]
    return [*judged, Usability("simulated", False, "there is no transport for it to go around", "see those above")]


def advise(facts: Facts, *, ranks: int, device_kind: str) -> list[Advice]:
    """What forbids no transport, but is likely to be slow or to fail later."""
    advice = []
    if device_kind == "cuda":
        for device in facts.gpus.devices[:ranks]:
            node = device.numa_node
            near = next((found.cpus for found in facts.numa.nodes if found.index == node), ())
            if near and facts.numa.affinity and not set(near) & set(facts.numa.affinity):
                fact = f"this process may run on no CPU of NUMA node {node}, where GPU {device.index} is"
                remedy = f"start it by `numactl --cpunodebind={node}`"
                remedy += _docker(facts, f"--cpuset-cpus={format_cpus(near)}")
                advice.append(Advice(f"{fact}: copies through host memory cross the nodes", remedy))
        if facts.gpus.direct_launches.ok is False:
            fact = f"kernels are launched by Triton's own call, because {facts.gpus.direct_launches.detail}"
            advice.append(Advice(f"{fact}: {LAUNCH_COST}", LAUNCH_REMEDY))
        settings = facts.environment.get("PYTORCH_ALLOC_CONF", "") + facts.environment.get(
            "PYTORCH_CUDA_ALLOC_CONF", ""
        )
        if "expandable_segments:true" in settings.lower() and facts.host.pidfd_getfd.ok is False:
            fact = f"PyTorch's expandable segments cannot be shared: pidfd_getfd says {facts.host.pidfd_getfd.detail}"
            remedy = "leave expandable_segments out of PYTORCH_ALLOC_CONF" + _docker(facts, "--cap-add=SYS_PTRACE")
            advice.append(Advice(fact, remedy))
    return advice


def slab_bytes(
    ranks: int, *, shape: ExpertShape = _LARGE_SHAPE, num_lanes: int = 2, max_tokens: int = DEFAULT_MAX_TOKENS
) -> int:
    """Host memory of all ranks for the slabs that go through it: a rank's tokens once, its sums for every rank."""
    row_bytes = RowFormat(shape).row_bytes + ranks * shape.hidden_size * shape.dtype.itemsize
    return ranks * num_lanes * max_tokens * row_bytes if ranks > 1 else 0


def format_bytes(num_bytes: int | None) -> str:
    """In the largest binary unit that leaves a number of at least 1."""
    if num_bytes is None:
        return "unknown"
    if num_bytes == UNLIMITED:
        return "unlimited"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            number = num_bytes / size
            return f"{number:.0f} {unit}" if number >= 100 or number == int(number) else f"{number:.1f} {unit}"
    return f"{num_bytes} bytes"


def format_cpus(cpus: tuple[int, ...]) -> str:
    """0-3,8 for (0, 1, 2, 3, 8)."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


@dataclass(frozen=True, slots=True)
class _Judge:
    """The question, so that each transport's answer reads as its list of needs."""

    facts: Facts
    ranks: int
    device_kind: str
    peer_access: bool
    shared_bytes: int

    def local(self) -> Usability:
        if self.ranks == 1:
            return Usability("local", True, "one rank holds all experts, nothing is sent")
        return Usability("local", False, f"for one rank, and there are {self.ranks}", "ask for --ranks 1")

    def collectives(self, name: str) -> Usability:
        """`allgather` and `alltoall`: gloo between CPUs, NCCL between GPUs."""
        library = "nccl" if self.device_kind == "cuda" else "gloo"
        if refusal := self._refusal():
            return _judged(name, [refusal])
        if library not in self.facts.versions.backends:
            return _judged(name, [Advice(f"this torch is built without {library}", "install another build of torch")])
        if library == "gloo":
            return Usability(name, True, "over gloo, between the CPUs of this host")
        title = f"over NCCL {self.facts.versions.nccl or '(version unknown)'}"
        if not self._lacks_of_peer_access():
            return Usability(name, True, f"{title}, by peer access{self._links()}")
        if self.facts.environment.get("NCCL_SHM_DISABLE", "0") != "0":
            reason = f"{title}, by sockets, which is slow: no peer access, and NCCL_SHM_DISABLE is set"
            return Usability(name, True, reason, "unset NCCL_SHM_DISABLE")
        free_bytes = self.facts.host.shm_free_bytes
        if free_bytes is not None and free_bytes < _NCCL_SHM_BYTES:
            reason = f"without peer access NCCL needs /dev/shm, which has {format_bytes(free_bytes)} free"
            usable = free_bytes >= _NCCL_SEGMENT_BYTES
            return Usability(name, usable, f"{title}; {reason}" if usable else reason, self._larger_shm())
        size = "/dev/shm of unknown size" if free_bytes is None else f"{format_bytes(free_bytes)} free in /dev/shm"
        return Usability(name, True, f"{title}, through host memory ({size})")

    def copy_engine(self) -> Usability:
        name = "copy-engine"
        if refusal := self._no_gpus() or self._refusal():
            return _judged(name, [refusal])
        lacks = [
            *self._lacks_of_peer_access(),
            *self._lacks_of_flags(),
            *self._lacks_of_descriptors(),
        ]
        return _judged(name, lacks, f"peer access between all {self.ranks} GPUs{self._links()}, no multiprocessors")

    def host_staged(self) -> Usability:
        name = "host-staged"
        if refusal := self._no_gpus() or self._refusal():
            return _judged(name, [refusal])
        pinned = self.facts.gpus.pinned_memory
        limit = f"raise the limit on locked memory ({format_bytes(self.facts.host.locked_memory_bytes)}): "
        limit += "`ulimit -l unlimited`" + _docker(self.facts, "--ulimit memlock=-1")
        lacks = [
            *self._lacks_of_flags(),
            *self._lacks_of_shared_memory(),
            *self._lack_of(pinned, "pinning of shared host memory", limit),
        ]
        reason = f"{format_bytes(self.shared_bytes)} of pinned host memory, no multiprocessors"
        tried_bytes, limit_bytes = self.facts.gpus.pinned_bytes, self.facts.host.locked_memory_bytes
        if not lacks and limit_bytes is not None and tried_bytes <= limit_bytes < self.shared_bytes:
            reason += f"; tried with {format_bytes(tried_bytes)}, within the limit on locked memory, which may bind"
            return Usability(name, True, reason, limit)
        return _judged(name, lacks, reason)

    def shared_memory(self) -> Usability:
        name = "shared-memory"
        if self.device_kind != "cpu":
            return _judged(name, [Advice("between CPUs, and the ranks run on GPUs", "use host-staged")])
        if refusal := self._refusal():
            return _judged(name, [refusal])
        return _judged(name, self._lacks_of_shared_memory(), "memory that the processes of this host share")

    # ---- needs

    def _refusal(self) -> Advice | None:
        """What makes every further question pointless: no peers, or not a device for every rank."""
        if self.ranks == 1:
            return Advice("one rank sends nothing, local is used", "ask for --ranks 2 or more")
        count = len(self.facts.gpus.devices)
        if self.device_kind == "cpu" or count >= self.ranks:
            return None
        remedy = "check CUDA_VISIBLE_DEVICES" + _docker(self.facts, "--gpus all")
        if count > 1:
            remedy = f"ask for --ranks {count}, or {remedy}"
        problem = f" ({self.facts.gpus.problem})" if self.facts.gpus.problem else ""
        return Advice(f"{self.ranks} ranks need {self.ranks} GPUs, and there are {count}{problem}", remedy)

    def _no_gpus(self) -> Advice | None:
        if self.device_kind == "cuda":
            return None
        remedy = "" if self.ranks == 1 else "use shared-memory, the same protocol for CPUs"
        return Advice("between GPUs, and the ranks run on CPUs", remedy)

    def _lacks_of_peer_access(self) -> Iterable[Advice]:
        if not self.peer_access:
            return [Advice("peer access is forbidden by --no-peer-access", "leave that option out")]
        if peers_forbidden(self.facts.environment):
            return [Advice("peer access is forbidden by NCCL_P2P_DISABLE", "unset that variable")]
        remedy = "use host-staged"
        for peer in self._peers():
            if peer.access is None:
                return [Advice(f"unknown whether GPU {peer.source} can access GPU {peer.target}", remedy)]
            if not peer.access:
                link = f" (link {peer.link})" if peer.link else ""
                return [Advice(f"GPU {peer.source} cannot access GPU {peer.target}{link}", remedy)]
        return []

    def _lacks_of_flags(self) -> Iterable[Advice]:
        if self.facts.versions.cuda_bindings is None:
            return [Advice("the Python package cuda-bindings is missing", "`pip install cuda-bindings`")]
        for device in self.facts.gpus.devices[: self.ranks]:
            lack = self._lack_of(
                device.stream_memory_operations,
                f"stream memory operations on GPU {device.index}",
                "use a driver of CUDA 12 or later; until then alltoall",
            )
            if lack:
                return lack
        return []

    def _lacks_of_shared_memory(self) -> Iterable[Advice]:
        host = self.facts.host
        lacks = self._lack_of(
            host.memfd, "shared memory by memfd_create", "use Linux, in a sandbox that allows memfd_create"
        )
        lacks += self._lacks_of_descriptors()
        rooms = (host.memory_available_bytes, host.cgroup_free_bytes)
        room = min((room for room in rooms if room is not None and room != UNLIMITED), default=None)
        if room is not None and room < self.shared_bytes:
            fact = f"needs {format_bytes(self.shared_bytes)} of host memory, {format_bytes(room)} are free"
            remedy = "use fewer tokens a step"
            if room == host.cgroup_free_bytes:
                remedy += f", or raise the limit of {format_bytes(host.cgroup_limit_bytes)}"
                remedy += _docker(self.facts, "--memory")
            lacks.append(Advice(fact, remedy))
        return lacks

    def _lack_of(self, check: Check, need: str, remedy: str) -> list[Advice]:
        if check.ok:
            return []
        detail = f" ({check.detail})" if check.detail else ""
        return [Advice(f"{'unknown:' if check.ok is None else 'no'} {need}{detail}", remedy)]

    def _lacks_of_descriptors(self) -> list[Advice]:
        check = self.facts.host.socket_descriptors
        return self._lack_of(check, "descriptors over Unix sockets", "use a sandbox that lets them be sent")

    def _peers(self) -> list[Peer]:
        return [p for p in self.facts.gpus.peers if p.source < self.ranks and p.target < self.ranks]

    def _links(self) -> str:
        kinds = sorted({peer.link for peer in self._peers() if peer.link})
        return f" ({', '.join(kinds)})" if kinds else ""

    def _larger_shm(self) -> str:
        if self.facts.host.container:
            return f"docker: --shm-size={_NCCL_SHM_BYTES >> 30}g or --ipc=host"
        return f"`mount -o remount,size={_NCCL_SHM_BYTES >> 30}G /dev/shm`"


def _judged(name: str, lacks: Iterable[Advice], reason: str = "") -> Usability:
    lacks = list(lacks)
    if not lacks:
        return Usability(name, True, reason)
    remedies = dict.fromkeys(lack.remedy for lack in lacks if lack.remedy)
    return Usability(name, False, "; ".join(lack.fact for lack in lacks), "; ".join(remedies))


def _docker(facts: Facts, flag: str) -> str:
    """The flag for whoever starts the container; nothing outside of one."""
    return f" (docker: {flag})" if facts.host.container else ""
