"""What transports need from a machine: functions of `Facts` that say what is missing and what would help.

A transport names its needs in `Transport.refusal`. What is unknown counts as missing and is reported as unknown.
Without facts (`None`), before the machine has been examined, only the user's request is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from antiphon.machine.advice import Advice, for_docker, format_bytes
from antiphon.machine.facts import UNLIMITED, Check, Facts, Peer
from antiphon.runtime import Device, find_device

_NCCL_SEGMENT_BYTES = 10 << 20
"""What NCCL allocates in /dev/shm per connection; with less, none can be made."""

_NCCL_SHM_BYTES = 1 << 30
"""What NCCL's documentation recommends for containers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks that a transport is to serve, on one host, each with a device of its own.

    device_kind: a kind of `antiphon.device.table`. peer_access: whether the user allows it. host_bytes: of all ranks'
    slabs in host memory; `None` for what the transport would take.
    """

    ranks: int
    device_kind: str
    peer_access: bool = True
    num_lanes: int = 2
    max_tokens: int = 8192
    host_bytes: int | None = None

    @property
    def device(self) -> Device:
        """The first of the devices, for their capabilities."""
        return find_device(self.device_kind)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a transport cannot serve a world, the bound that the world exceeds, and what would help."""

    fact: str
    remedy: str = ""
    limit: str = field(default="", kw_only=True)

    def __str__(self) -> str:
        """The fact and its limit, without the remedy."""
        return f"{self.fact}: {self.limit}" if self.limit else self.fact


@dataclass(frozen=True, slots=True)
class Way:
    """How a transport's data would travel; remedy: what would make it faster or safer."""

    description: str
    remedy: str = ""


def peers_forbidden(environment: Mapping[str, str]) -> bool:
    """Whether `NCCL_P2P_DISABLE` forbids peer access, to NCCL and so to us."""
    return environment.get("NCCL_P2P_DISABLE", "").strip() not in ("", "0")


def peer_environment(*, peer_access: bool) -> dict[str, str]:
    """The variables of ranks that may or may not access their peers: what is forbidden to us is forbidden to NCCL."""
    return {} if peer_access else {"NCCL_P2P_DISABLE": "1"}


def refusal_of(lacks: Iterable[Advice]) -> Refusal | None:
    """One refusal for everything that is missing; `None` if nothing is."""
    lacks = list(lacks)
    if not lacks:
        return None
    remedies = dict.fromkeys(lack.remedy for lack in lacks if lack.remedy)
    return Refusal("; ".join(lack.fact for lack in lacks), "; ".join(remedies))


def peers_to_talk_to(facts: Facts | None, world: World) -> Refusal | None:
    """What is missing first of all: peers, and a device for every rank."""
    if world.ranks == 1:
        return Refusal("one rank sends nothing, local is used", "ask for --ranks 2 or more")
    if not world.device.peer_access or facts is None:  # what facts know of GPUs is CUDA's
        return None
    count = len(facts.gpus.devices)
    if count >= world.ranks:
        return None
    remedy = "check CUDA_VISIBLE_DEVICES" + for_docker(facts, "--gpus all")
    if count > 1:
        remedy = f"ask for --ranks {count}, or {remedy}"
    problem = f" ({facts.gpus.problem})" if facts.gpus.problem else ""
    return Refusal(f"{world.ranks} ranks need {world.ranks} GPUs", remedy, limit=f"there are {count}{problem}")


def gpus(world: World) -> Refusal | None:
    """Copy engines, which only GPUs have."""
    if world.device.stream_memory_operations:
        return None
    remedy = "" if world.ranks == 1 else "use shared-memory, the same protocol for CPUs"
    return Refusal("between GPUs, and the ranks run on CPUs", remedy)


def library(facts: Facts | None, world: World, name: str) -> Refusal | None:
    """A backend of torch.distributed, such as "gloo", and peers."""
    if refusal := peers_to_talk_to(facts, world):
        return refusal
    if facts is not None and name not in facts.versions.backends:
        return Refusal(f"this torch is built without {name}", "install another build of torch")
    return None


def collectives(facts: Facts | None, world: World) -> Refusal | None:
    """The backend of torch.distributed for the world's devices, and what it needs."""
    name = world.device.collective_backend
    if refusal := library(facts, world, name):
        return refusal
    return shm_of_nccl(facts, world) if name == "nccl" else None


def way_of_collectives(facts: Facts, world: World) -> Way:
    """How that backend gets from one device to another."""
    name = world.device.collective_backend
    if name == "nccl":
        return way_of_nccl(facts, world)
    return Way(f"over {name}" if world.device.queues else f"over {name}, between the CPUs of this host")


def shm_of_nccl(facts: Facts | None, world: World) -> Refusal | None:
    """Room in /dev/shm, where NCCL goes through host memory."""
    if facts is None or not _lacks_room(facts, world, _NCCL_SEGMENT_BYTES):
        return None
    free = format_bytes(facts.host.shm_free_bytes)
    return Refusal("without peer access NCCL needs /dev/shm", _larger_shm(facts), limit=f"it has {free} free")


def way_of_nccl(facts: Facts, world: World) -> Way:
    """How NCCL gets from one GPU to another."""
    title = f"over NCCL {facts.versions.nccl or '(version unknown)'}"
    if not lacks_of_peer_access(facts, world):
        return Way(f"{title}, by peer access{links(facts, world)}")
    if facts.environment.get("NCCL_SHM_DISABLE", "0") != "0":
        slow = f"{title}, by sockets, which is slow: no peer access, and NCCL_SHM_DISABLE is set"
        return Way(slow, "unset NCCL_SHM_DISABLE")
    free_bytes = facts.host.shm_free_bytes
    if _lacks_room(facts, world, _NCCL_SHM_BYTES):
        little = f"without peer access NCCL needs /dev/shm, which has {format_bytes(free_bytes)} free"
        return Way(f"{title}; {little}", _larger_shm(facts))
    size = "/dev/shm of unknown size" if free_bytes is None else f"{format_bytes(free_bytes)} free in /dev/shm"
    return Way(f"{title}, through host memory ({size})")


def lacks_of_peer_access(facts: Facts | None, world: World) -> list[Advice]:
    """What is missing for peer access between all GPUs of the ranks."""
    if not world.peer_access:
        return [Advice("peer access is forbidden by --no-peer-access", "leave that option out, or use host-staged")]
    if facts is None:
        return []
    if peers_forbidden(facts.environment):
        return [Advice("peer access is forbidden by NCCL_P2P_DISABLE", "unset that variable, or use host-staged")]
    remedy = "use host-staged"
    for peer in _peers(facts, world):
        if peer.access is None:
            return [Advice(f"unknown whether GPU {peer.source} can access GPU {peer.target}", remedy)]
        if not peer.access:
            link = f" (link {peer.link})" if peer.link else ""
            return [Advice(f"GPU {peer.source} cannot access GPU {peer.target}{link}", remedy)]
    return []


def lacks_of_flags(facts: Facts | None, world: World) -> list[Advice]:
    """What is missing for stream memory operations: on the GPUs of the ranks, or the package that calls them."""
    if facts is None:
        return []
    if facts.versions.cuda_bindings is None:
        return [Advice("the Python package cuda-bindings is missing", "`pip install cuda-bindings`")]
    for device in facts.gpus.devices[: world.ranks]:
        need = f"stream memory operations on GPU {device.index}"
        remedy = "use a driver of CUDA 12 or later; until then alltoall"
        if lack := lack_of(device.stream_memory_operations, need, remedy):
            return lack
    return []


def lacks_of_descriptors(facts: Facts | None) -> list[Advice]:
    """What is missing to send file descriptors over Unix sockets."""
    if facts is None:
        return []
    remedy = "use a sandbox that lets them be sent"
    return lack_of(facts.host.socket_descriptors, "descriptors over Unix sockets", remedy)


def lacks_of_shared_memory(facts: Facts | None, num_bytes: int) -> list[Advice]:
    """What this host lacks for memory that several processes map, `num_bytes` in all."""
    if facts is None:
        return []
    host = facts.host
    lacks = lack_of(host.memfd, "shared memory by memfd_create", "use Linux, in a sandbox that allows memfd_create")
    lacks += lacks_of_descriptors(facts)
    rooms = (host.memory_available_bytes, host.cgroup_free_bytes)
    room = min((room for room in rooms if room is not None and room != UNLIMITED), default=None)
    if room is not None and room < num_bytes:
        remedy = "use fewer tokens a step"
        if room == host.cgroup_free_bytes:
            remedy += f", or raise the limit of {format_bytes(host.cgroup_limit_bytes)}"
            remedy += for_docker(facts, "--memory")
        fact = f"needs {format_bytes(num_bytes)} of host memory, {format_bytes(room)} are free"
        lacks.append(Advice(fact, remedy))
    return lacks


def lack_of(check: Check, need: str, remedy: str) -> list[Advice]:
    """A need that one check of the facts answers."""
    if check.ok:
        return []
    detail = f" ({check.detail})" if check.detail else ""
    return [Advice(f"{'unknown:' if check.ok is None else 'no'} {need}{detail}", remedy)]


def links(facts: Facts, world: World) -> str:
    """The links between the GPUs of the ranks, in words."""
    kinds = sorted({peer.link for peer in _peers(facts, world) if peer.link})
    return f" ({', '.join(kinds)})" if kinds else ""


def _peers(facts: Facts, world: World) -> list[Peer]:
    return [p for p in facts.gpus.peers if p.source < world.ranks and p.target < world.ranks]


def _lacks_room(facts: Facts, world: World, num_bytes: int) -> bool:
    """Whether NCCL goes through /dev/shm and finds less than `num_bytes` free there."""
    by_shm = lacks_of_peer_access(facts, world) and facts.environment.get("NCCL_SHM_DISABLE", "0") == "0"
    free_bytes = facts.host.shm_free_bytes
    return bool(by_shm) and free_bytes is not None and free_bytes < num_bytes


def _larger_shm(facts: Facts) -> str:
    if facts.host.container:
        return f"docker: --shm-size={_NCCL_SHM_BYTES >> 30}g or --ipc=host"
    return f"`mount -o remount,size={_NCCL_SHM_BYTES >> 30}G /dev/shm`"
