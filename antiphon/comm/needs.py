"""What transports need from a machine: functions of `Facts` that say what is missing and what would help.

A transport lists its needs in `Transport.refusal`. Anything unknown counts as missing, and is reported as unknown.
Without facts (`None`), before the machine has been examined, only the user's request is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from antiphon.machine.advice import Advice, for_docker, format_bytes
from antiphon.machine.facts import UNLIMITED, Check, Facts, Peer
from antiphon.runtime import Device, find_device

_NCCL_SEGMENT_BYTES = 10 << 20
"""What NCCL allocates in /dev/shm per connection. With less free, it cannot connect."""

_NCCL_SHM_BYTES = 1 << 30
"""What NCCL's documentation recommends for containers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks of one host that a transport is to serve, each with its own device.

    device_kind: a kind in `antiphon.device.table`. peer_access: whether the user allows it. host_bytes: host memory for
    the slabs of all ranks; `None` for the transport's own estimate.
    """

    ranks: int
    device_kind: str
    peer_access: bool = True
    num_lanes: int = 2
    max_tokens: int = 8192
    host_bytes: int | None = None

    @property
    def device(self) -> Device:
        """The first device, which stands for the capabilities of all."""
        return find_device(self.device_kind)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a transport cannot serve a world, the limit that the world exceeds, and what would help."""

    fact: str
    remedy: str = ""
    limit: str = field(default="", kw_only=True)

    def __str__(self) -> str:
        """The fact and its limit, without the remedy."""
        return f"{self.fact}: {self.limit}" if self.limit else self.fact


@dataclass(frozen=True, slots=True)
class Way:
    """How a transport's data would travel. remedy: what would make it faster or safer."""

    description: str
    remedy: str = ""


def peers_forbidden(environment: Mapping[str, str]) -> bool:
    """Whether `NCCL_P2P_DISABLE` forbids peer access: to NCCL, and therefore to our transports too."""
    return environment.get("NCCL_P2P_DISABLE", "").strip() not in ("", "0")


def peer_environment(*, peer_access: bool) -> dict[str, str]:
    """Environment variables for ranks that extend a ban on peer access to NCCL."""
    return {} if peer_access else {"NCCL_P2P_DISABLE": "1"}


def refusal_for(needs: Iterable[Advice]) -> Refusal | None:
    """Combine everything that is missing into one refusal; `None` if nothing is missing."""
    needs = list(needs)
    if not needs:
        return None
    remedies = dict.fromkeys(need.remedy for need in needs if need.remedy)
    return Refusal("; ".join(need.fact for need in needs), "; ".join(remedies))


def peers(facts: Facts | None, world: World) -> Refusal | None:
    """The basic needs: at least one peer, and a device for every rank."""
    if world.ranks == 1:
        return Refusal("a single rank sends nothing and uses local", "use --ranks 2 or more")
    if not world.device.peer_access or facts is None:  # the facts describe CUDA GPUs only
        return None
    count = len(facts.gpus.devices)
    if count >= world.ranks:
        return None
    remedy = "check CUDA_VISIBLE_DEVICES" + for_docker(facts, "--gpus all")
    if count > 1:
        remedy = f"use --ranks {count}, or {remedy}"
    problem = f" ({facts.gpus.problem})" if facts.gpus.problem else ""
    return Refusal(f"{world.ranks} ranks need {world.ranks} GPUs", remedy, limit=f"there are {count}{problem}")


def gpus(world: World) -> Refusal | None:
    """GPUs, whose copy engines move the data."""
    if world.device.stream_memory_operations:
        return None
    remedy = "" if world.ranks == 1 else "use shared-memory, the same protocol for CPUs"
    return Refusal("needs GPUs, and the ranks run on CPUs", remedy)


def library(facts: Facts | None, world: World, name: str) -> Refusal | None:
    """Peers, and the backend `name` of torch.distributed, such as "gloo"."""
    if refusal := peers(facts, world):
        return refusal
    if facts is not None and name not in facts.versions.backends:
        return Refusal(f"this torch was built without {name}", "install another build of torch")
    return None


def collectives(facts: Facts | None, world: World) -> Refusal | None:
    """The torch.distributed backend of the world's devices, and what that backend needs."""
    name = world.device.collective_backend
    if refusal := library(facts, world, name):
        return refusal
    return _nccl_shm(facts, world) if name == "nccl" else None


def collectives_way(facts: Facts, world: World) -> Way:
    """How that backend moves data between devices."""
    name = world.device.collective_backend
    if name == "nccl":
        return _nccl_way(facts, world)
    return Way(f"over {name}" if world.device.queues else f"over {name}, between the CPUs of this host")


def _nccl_shm(facts: Facts | None, world: World) -> Refusal | None:
    """Space in /dev/shm, which NCCL needs when it goes through host memory."""
    if facts is None or not _lacks_room(facts, world, _NCCL_SEGMENT_BYTES):
        return None
    free = format_bytes(facts.host.shm_free_bytes)
    return Refusal("without peer access NCCL needs /dev/shm", _larger_shm(facts), limit=f"it has {free} free")


def _nccl_way(facts: Facts, world: World) -> Way:
    """How NCCL moves data between GPUs."""
    title = f"over NCCL {facts.versions.nccl or '(version unknown)'}"
    if not missing_peer_access(facts, world):
        return Way(f"{title}, by peer access{links(facts, world)}")
    if facts.environment.get("NCCL_SHM_DISABLE", "0") != "0":
        slow = f"{title}, over sockets, which is slow: there is no peer access, and NCCL_SHM_DISABLE is set"
        return Way(slow, "unset NCCL_SHM_DISABLE")
    free_bytes = facts.host.shm_free_bytes
    if _lacks_room(facts, world, _NCCL_SHM_BYTES):
        little = f"without peer access NCCL needs /dev/shm, which has {format_bytes(free_bytes)} free"
        return Way(f"{title}; {little}", _larger_shm(facts))
    size = "/dev/shm of unknown size" if free_bytes is None else f"{format_bytes(free_bytes)} free in /dev/shm"
    return Way(f"{title}, through host memory ({size})")


def missing_peer_access(facts: Facts | None, world: World) -> list[Advice]:
    """What is missing for peer access between all GPUs of the ranks."""
    if not world.peer_access:
        return [Advice("peer access is forbidden by --no-peer-access", "drop that option, or use host-staged")]
    if facts is None:
        return []
    if peers_forbidden(facts.environment):
        return [Advice("peer access is forbidden by NCCL_P2P_DISABLE", "unset that variable, or use host-staged")]
    remedy = "use host-staged"
    for peer in _gpu_pairs(facts, world):
        if peer.access is None:
            return [Advice(f"it is unknown whether GPU {peer.source} can access GPU {peer.target}", remedy)]
        if not peer.access:
            link = f" (link {peer.link})" if peer.link else ""
            return [Advice(f"GPU {peer.source} cannot access GPU {peer.target}{link}", remedy)]
    return []


def missing_flags(facts: Facts | None, world: World) -> list[Advice]:
    """What is missing for stream memory operations: support by the ranks' GPUs, or the package that calls them."""
    if facts is None:
        return []
    if facts.versions.cuda_bindings is None:
        return [Advice("the Python package cuda-bindings is missing", "`pip install cuda-bindings`")]
    for device in facts.gpus.devices[: world.ranks]:
        need = f"stream memory operations on GPU {device.index}"
        remedy = "install a driver for CUDA 12 or later, or use alltoall"
        if advice := missing(device.stream_memory_operations, need, remedy):
            return advice
    return []


def missing_descriptors(facts: Facts | None) -> list[Advice]:
    """What is missing for sending file descriptors over Unix sockets."""
    if facts is None:
        return []
    remedy = "use a sandbox that allows sending them"
    return missing(facts.host.socket_descriptors, "descriptors over Unix sockets", remedy)


def missing_shared_memory(facts: Facts | None, num_bytes: int) -> list[Advice]:
    """What is missing for host memory that several processes map, `num_bytes` in total."""
    if facts is None:
        return []
    host = facts.host
    advice = missing(host.memfd, "shared memory by memfd_create", "use Linux, and a sandbox that allows memfd_create")
    advice += missing_descriptors(facts)
    rooms = (host.memory_available_bytes, host.cgroup_free_bytes)
    room = min((room for room in rooms if room is not None and room != UNLIMITED), default=None)
    if room is not None and room < num_bytes:
        remedy = "use fewer tokens per step"
        if room == host.cgroup_free_bytes:
            remedy += f", or raise the limit of {format_bytes(host.cgroup_limit_bytes)}"
            remedy += for_docker(facts, "--memory")
        fact = f"needs {format_bytes(num_bytes)} of host memory, and {format_bytes(room)} is free"
        advice.append(Advice(fact, remedy))
    return advice


def missing(check: Check, need: str, remedy: str) -> list[Advice]:
    """What is missing for a need that a single check answers."""
    if check.ok:
        return []
    detail = f" ({check.detail})" if check.detail else ""
    return [Advice(f"{'unknown:' if check.ok is None else 'no'} {need}{detail}", remedy)]


def links(facts: Facts, world: World) -> str:
    """The kinds of links between the ranks' GPUs, in parentheses."""
    kinds = sorted({peer.link for peer in _gpu_pairs(facts, world) if peer.link})
    return f" ({', '.join(kinds)})" if kinds else ""


def _gpu_pairs(facts: Facts, world: World) -> list[Peer]:
    return [p for p in facts.gpus.peers if p.source < world.ranks and p.target < world.ranks]


def _lacks_room(facts: Facts, world: World, num_bytes: int) -> bool:
    """Whether NCCL must go through /dev/shm and less than `num_bytes` is free there."""
    by_shm = missing_peer_access(facts, world) and facts.environment.get("NCCL_SHM_DISABLE", "0") == "0"
    free_bytes = facts.host.shm_free_bytes
    return bool(by_shm) and free_bytes is not None and free_bytes < num_bytes


def _larger_shm(facts: Facts) -> str:
    if facts.host.container:
        return f"docker: --shm-size={_NCCL_SHM_BYTES >> 30}g or --ipc=host"
    return f"`mount -o remount,size={_NCCL_SHM_BYTES >> 30}G /dev/shm`"
