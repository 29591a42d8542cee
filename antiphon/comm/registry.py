"""Transports by name: parsing the option, the choice of `auto`, and construction.

auto | local | allgather | alltoall | copy-engine | one-sided | host-staged | shared-memory
nccl-zero-cta                               NCCL's own copy-engine collectives, as a baseline
allgather:16ctas, alltoall:16ctas           NCCL limited to 16 blocks, for which the GEMMs of a split step leave SMs
simulated[:INNER[:BANDWIDTH[:LATENCY]]]     such as simulated:alltoall:200MB/s:1ms
package.module:Class                        the user's own `Transport`
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from antiphon.comm.group import RankGroup
from antiphon.comm.needs import Refusal, World, peers_forbidden
from antiphon.comm.simulated import Link, parse_link
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Transport
from antiphon.core.errors import OptionError, first_line, out_of_range, unknown_value
from antiphon.machine.facts import Facts
from antiphon.runtime import Device, Streams, find_device

_CLASSES = {
    "local": ("antiphon.comm.local:LocalTransport",),
    "allgather": (
        "antiphon.comm.collective.allgather:AllGatherTransport",
        "antiphon.comm.collective.allgather:QueuedAllGatherTransport",
    ),
    "alltoall": (
        "antiphon.comm.collective.alltoall:AllToAllTransport",
        "antiphon.comm.collective.queued_alltoall:QueuedAllToAllTransport",
    ),
    "copy-engine": ("antiphon.comm.slab.copy_engine:CopyEngineTransport",),
    "one-sided": ("antiphon.comm.slab.one_sided:OneSidedTransport",),
    "host-staged": ("antiphon.comm.slab.host_staged:HostStagedTransport",),
    "shared-memory": ("antiphon.comm.slab.shared_memory:SharedMemoryTransport",),
    "nccl-zero-cta": ("antiphon.comm.collective.nccl_zero_cta:NcclZeroCtaTransport",),
}
"""The class of each transport, followed by the one for devices that queue their work if it is different."""

_BASELINES = ("nccl-zero-cta",)
"""Transports to compare with. `usable_transports` leaves them out."""

_LARGE_SHAPE = ExpertShape(num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16)
"""The shape of DeepSeek-V3, the largest rows in common use."""

_SLABS_OF_GPUS = {
    "one-sided": "copies between peers take no SMs from compute, and small steps exchange by kernel",
    "host-staged": "there is no peer access; copies by host memory take no SMs, and small steps exchange by kernel",
}
"""The choices of `auto` on GPUs, and why. The first that is not refused is taken."""

_WORTHWHILE_SAVING = 0.25
"""Fraction of the bytes that exact routing must save to be worth exchanging counts."""

_WORTHWHILE_SAVING_OF_SLABS = 0.5
"""The same, to be worth the SMs of communication kernels, which the slab transports do not need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSpec:
    """A parsed transport option. `name` is a known name, `auto`, or the path of a class."""

    name: str
    link: Link | None = None  # set for a simulated link
    ctas: int | None = None  # limit on the blocks of NCCL's kernels; `None`: NCCL chooses

    def __str__(self) -> str:
        if self.link is not None:
            return f"simulated {self.name} ({self.link})"
        return self.name if self.ctas is None else f"{self.name}:{self.ctas}ctas"


def parse_transport(text: str) -> TransportSpec:
    """Parse a transport option. Raises `OptionError` for an unknown name or link."""
    first, *rest = text.split(":")
    names = ("auto", *_CLASSES, "simulated")
    if first not in names and (rest or "." in first):
        if len(rest) != 1 or not rest[0].isidentifier():
            raise _wrong(text, "is not package.module:Class", "name the class after one colon")
        return TransportSpec(name=text)
    if first not in names:
        raise unknown_value("transport", text, names)
    if first != "simulated":
        if len(rest) == 1 and len(_CLASSES.get(first, ())) > 1 and re.fullmatch(r"[1-9]\d{0,2}ctas", rest[0]):
            return TransportSpec(name=first, ctas=int(rest[0].removesuffix("ctas")))
        if rest:
            raise _wrong(text, "has settings, which only simulated accepts", f"use {first!r}")
        return TransportSpec(name=first)
    if len(rest) > 3:
        raise _wrong(text, "has too many parts", "use simulated:INNER:BANDWIDTH:LATENCY")
    settings: list[str | None] = [*rest, *[None] * (3 - len(rest))]
    inner, bandwidth, latency = settings[0] or "auto", settings[1], settings[2]
    if inner not in ("auto", *_CLASSES):
        raise unknown_value("transport inside simulated", inner, ("auto", *_CLASSES))
    return TransportSpec(name=inner, link=parse_link(bandwidth, latency))


def _wrong(text: str, what: str, remedy: str) -> OptionError:
    return OptionError(f"transport={text!r} {what}", remedy=remedy, option="transport", value=text)


def choose_transport(
    spec: TransportSpec,
    shape: ExpertShape,
    num_ranks: int,
    *,
    device_kind: str = "cpu",
    peer_access: bool = True,
) -> tuple[TransportSpec, str]:
    """The transport to use, with `auto` resolved, and why.

    On GPUs `auto` prefers a transport that takes no SMs from compute: one-sided with peer access, otherwise
    host-staged. Both send all tokens to all ranks, so with many ranks exact routing is worth more.
    A token with K experts reaches W(1 - (1 - 1/W)^K) of W ranks on average. `alltoall` sends one copy to each of these;
    `allgather` sends one to every rank, but without an exchange of counts that the host must wait for.

    peer_access: whether peer copies are allowed.
    Raises `OptionError` for a transport that cannot serve these ranks on these devices.
    """
    if num_ranks == 1 and (spec.name == "auto" or spec.name in _CLASSES):
        return replace(spec, name="local"), "one rank holds all experts, so nothing is sent"
    world = World(ranks=num_ranks, device_kind=device_kind, peer_access=peer_access)
    if spec.name in _CLASSES and (refusal := _refusal(spec.name, None, shape, world)):
        raise refused(spec, refusal)
    if spec.ctas is not None and not world.device.sm_carveout:
        raise OptionError(
            f"transport {str(spec)!r} limits the blocks of NCCL's kernels",
            limit="the ranks run on CPUs",
            remedy=f"use {spec.name!r}",
            option="transport",
            value=str(spec),
        )
    if spec.name != "auto":
        return spec, "as asked"
    reached = num_ranks * (1 - (1 - 1 / num_ranks) ** shape.top_k)
    saving = 1 - reached / num_ranks
    fact = f"with uniform routing, a token with {shape.top_k} experts reaches {reached:.1f} of {num_ranks} ranks"
    if world.device.stream_memory_operations and saving < _WORTHWHILE_SAVING_OF_SLABS:
        for name, reason in _SLABS_OF_GPUS.items():
            if _refusal(name, None, shape, world) is None:
                return replace(spec, name=name), reason
    if saving < _WORTHWHILE_SAVING:
        limit = f"alltoall needs at least {_WORTHWHILE_SAVING:.0%}"
        return replace(spec, name="allgather"), f"{fact}: exact routing would save {saving:.0%} of the bytes, {limit}"
    return replace(spec, name="alltoall"), f"{fact}: exact routing saves {saving:.0%} of the bytes"


def refused(spec: TransportSpec, refusal: Refusal, cause: str = "") -> OptionError:
    """The error for an explicitly named transport that cannot serve. cause: what failed, in one line."""
    shown = f" ({cause})" if cause else ""
    return OptionError(
        f"transport {str(spec)!r} cannot be used here",
        limit=f"{refusal}{shown}",
        remedy=refusal.remedy or "use another transport",
        option="transport",
        value=str(spec),
    )


def _refusal(name: str, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
    return load_transport(TransportSpec(name=name), world.device_kind).refusal(facts, shape, world)


@dataclass(frozen=True, slots=True)
class Usability:
    """Whether a transport can be used, why or why not, and what would help. A usable one may have a remedy too."""

    name: str
    usable: bool
    reason: str
    remedy: str = ""


def usable_transports(
    facts: Facts, *, ranks: int, device_kind: str, peer_access: bool = True, shared_bytes: int | None = None
) -> list[Usability]:
    """One `Usability` per transport, for `ranks` ranks of one host, each with its own device.

    A transport is usable only if everything that it needs has been shown to work. Naming it explicitly tries it anyway.
    device_kind: "cpu" or "cuda". peer_access: False under `--no-peer-access`; `NCCL_P2P_DISABLE` in the facts has the
    same effect. shared_bytes: host memory that slabs between processes need; by default, that of a large model.

    Raises `OptionError` for fewer than one rank or an unknown kind of device.
    """
    if ranks < 1:
        raise out_of_range("ranks", ranks, "an integer of at least 1")
    if device_kind not in ("cpu", "cuda"):
        raise unknown_value("device_kind", device_kind, ("cpu", "cuda"))
    world = World(ranks=ranks, device_kind=device_kind, peer_access=peer_access, host_bytes=shared_bytes)
    judged = [_judge(name, facts, world) for name in _CLASSES if name not in _BASELINES]
    inner = [found.name for found in judged if found.usable]
    if inner:
        reason = f"wraps {' or '.join(inner)} and slows it down, for tests and planning"
        return [*judged, Usability("simulated", True, reason)]
    return [*judged, Usability("simulated", False, "there is no usable transport to wrap", "see those above")]


def _judge(name: str, facts: Facts, world: World) -> Usability:
    kind = load_transport(TransportSpec(name=name), world.device_kind)
    if refusal := kind.refusal(facts, _LARGE_SHAPE, world):
        return Usability(name, False, str(refusal), refusal.remedy)
    way = kind.way(facts, _LARGE_SHAPE, world)
    return Usability(name, True, way.description, way.remedy)


def create_transport(
    spec: TransportSpec | str,
    shape: ExpertShape,
    *,
    group: RankGroup,
    streams: Streams,
    num_lanes: int,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    peer_access: bool = True,
) -> Transport:
    """Make the transport of this rank. Every rank must make the same one at the same time: some connect to their peers.

    max_tokens: the most tokens that one lane of one rank ever sends. Some transports allocate buffers of that size.
    peer_access: whether GPUs may copy into each other's memory if they can. The environment variable
        NCCL_P2P_DISABLE=1 forbids it too.
    Raises `OptionError` for an unknown name, a class that cannot be loaded, or ranks that the transport cannot serve.
    """
    spec = parse_transport(spec) if isinstance(spec, str) else spec
    device = streams.owner
    device_kind = device.kind
    allowed = peer_access and not peers_forbidden(os.environ)
    reached = _peers_reach(group, device, allowed=allowed)
    # An explicitly named transport is tried whatever the driver says; its own error says what the machine lacks.
    peer_access = reached if spec.name == "auto" else allowed
    spec, _ = choose_transport(spec, shape, group.size, device_kind=device_kind, peer_access=peer_access)
    kind = load_transport(spec, device_kind)
    settings: dict[str, Any] = {} if spec.ctas is None else {"max_ctas": spec.ctas}
    transport = kind(shape, group=group, streams=streams, num_lanes=num_lanes, max_tokens=max_tokens, **settings)
    transport.peers_reach = reached
    if spec.link is None:
        return transport
    from antiphon.comm.simulated import SimulatedTransport

    return SimulatedTransport(transport, spec.link)


def _peers_reach(group: RankGroup, device: Device, *, allowed: bool) -> bool:
    """Whether all devices may and can access each other's memory. All are asked, as each knows only its own side."""
    if not device.peer_access or group.size == 1:
        return False
    devices = group.all_gather_object(device.identity())
    return all(group.all_gather_object(allowed and device.reaches(devices)))


def load_transport(spec: TransportSpec, device_kind: str = "cpu") -> type[Transport]:
    """Load the class behind a name other than `auto`. Raises `OptionError` if it cannot be loaded."""
    paths = _CLASSES.get(spec.name, (spec.name,))
    path = paths[-1 if find_device(device_kind).queues else 0]
    module_name, _, class_name = path.partition(":")
    try:
        loaded = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        remedy = "install cuda-bindings" if spec.name in _CLASSES else "check the path and PYTHONPATH"
        raise OptionError(
            f"transport {path!r} cannot be loaded",
            limit=first_line(error),
            remedy=remedy,
            option="transport",
            value=spec.name,
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Transport)):
        raise OptionError(
            f"transport {path!r} is not a subclass of antiphon.comm.Transport",
            remedy="name a class that is",
            option="transport",
            value=spec.name,
        )
    return loaded
