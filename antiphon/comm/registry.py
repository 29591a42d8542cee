"""Transports by name: what a user writes, which one `auto` takes and why, and how each is made.

auto | local | allgather | alltoall | copy-engine | host-staged | shared-memory
nccl-zero-cta                               NCCL's own copy-engine collectives, a baseline
allgather:16ctas, alltoall:16ctas           NCCL limited to so many blocks; compute of a split step leaves them SMs
simulated[:INNER[:BANDWIDTH[:LATENCY]]]     such as simulated:alltoall:200MB/s:1ms
package.module:Class                        a `Transport` of the user's own
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from antiphon.comm.group import RankGroup
from antiphon.comm.simulated import Link, parse_link
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, Transport
from antiphon.core.errors import OptionError, unknown_value
from antiphon.machine.facts import peers_forbidden
from antiphon.runtime import Streams

_CLASSES = {
    "local": "antiphon.comm.local:LocalTransport",
    "allgather": "antiphon.comm.collective.allgather:AllGatherTransport",
    "alltoall": "antiphon.comm.collective.alltoall:AllToAllTransport",
    "copy-engine": "antiphon.comm.slab.copy_engine:CopyEngineTransport",
    "nccl-zero-cta": "antiphon.comm.collective.nccl_zero_cta:NcclZeroCtaTransport",
    "host-staged": "antiphon.comm.slab.host_staged:HostStagedTransport",
    "shared-memory": "antiphon.comm.slab.shared_memory:SharedMemoryTransport",
}
_CUDA_CLASSES = {
    "allgather": "antiphon.comm.collective.allgather:NcclAllGatherTransport",
    "alltoall": "antiphon.comm.collective.nccl_alltoall:NcclAllToAllTransport",
}
"""Where a GPU needs another implementation."""

_NAMES = ("auto", *_CLASSES, "simulated")

_CUDA_ONLY = ("copy-engine", "host-staged", "nccl-zero-cta")

_WORTHWHILE_SAVING = 0.25
"""Share of the bytes that exact routing must save before it is worth the exchange of counts."""

_WORTHWHILE_SAVING_OF_SLABS = 0.5
"""The same before it is worth the multiprocessors of communication kernels, which the slab transports do not need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSpec:
    """A parsed transport option. `name` is a known name, `auto` or the path of a class."""

    name: str
    link: Link | None = None  # set for a simulated link
    ctas: int | None = None  # of NCCL, if it may not choose

    def __str__(self) -> str:
        if self.link is not None:
            return f"simulated {self.name} ({self.link})"
        return self.name if self.ctas is None else f"{self.name}:{self.ctas}ctas"


def parse_transport(text: str) -> TransportSpec:
    """Raises `OptionError` for a name or link that is not known."""
    first, *rest = text.split(":")
    if first not in _NAMES and (rest or "." in first):
        if len(rest) != 1 or not rest[0].isidentifier():
            raise OptionError(f"transport={text!r} is not package.module:Class; name the class after one colon")
        return TransportSpec(name=text)
    if first not in _NAMES:
        raise unknown_value("transport", text, _NAMES)
    if first != "simulated":
        if len(rest) == 1 and first in _CUDA_CLASSES and re.fullmatch(r"[1-9]\d{0,2}ctas", rest[0]):
            return TransportSpec(name=first, ctas=int(rest[0].removesuffix("ctas")))
        if rest:
            raise OptionError(f"transport={text!r} has settings, which only simulated takes; use {first!r}")
        return TransportSpec(name=first)
    if len(rest) > 3:
        raise OptionError(f"transport={text!r} has too many parts; use simulated:INNER:BANDWIDTH:LATENCY")
    settings: list[str | None] = [*rest, *[None] * (3 - len(rest))]
    inner, bandwidth, latency = settings[0] or "auto", settings[1], settings[2]
    if inner not in ("auto", *_CLASSES):
        raise unknown_value("transport inside simulated", inner, ("auto", *_CLASSES))
    return TransportSpec(name=inner, link=parse_link(bandwidth, latency))


def choose_transport(
    spec: TransportSpec,
    shape: ExpertShape,
    num_ranks: int,
    *,
    device_kind: str = "cpu",
    peer_access: bool = True,
) -> tuple[TransportSpec, str]:
    """The transport to use, with `auto` settled, and why.

    On GPUs `auto` takes a transport that needs no SM: copy-engine with peer access, else host-staged. Both send all
    tokens to all ranks, so from some number of ranks on exact routing is worth more.
    A token with K experts reaches W(1 - (1 - 1/W)^K) of W ranks on average; `alltoall` sends one copy to each of
    these, `allgather` one to all, but without an exchange of counts that the host must wait for.

    peer_access: whether peer copies are allowed.
    Raises `OptionError` for a transport that cannot serve these ranks on these devices.
    """
    if num_ranks == 1 and (spec.name == "auto" or spec.name in _CLASSES):
        return replace(spec, name="local"), "one rank holds all experts, nothing is sent"
    _check_fit(spec.name, num_ranks, device_kind, peer_access)
    if spec.ctas is not None and device_kind != "cuda":
        raise OptionError(f"transport {str(spec)!r} limits the blocks of NCCL's kernels; on CPUs use {spec.name!r}")
    if spec.name != "auto":
        return spec, "as asked"
    reached = num_ranks * (1 - (1 - 1 / num_ranks) ** shape.top_k)
    saving = 1 - reached / num_ranks
    fact = f"routed uniformly, a token with {shape.top_k} experts reaches {reached:.1f} of {num_ranks} ranks"
    if device_kind == "cuda" and saving < _WORTHWHILE_SAVING_OF_SLABS:
        if peer_access:
            return replace(spec, name="copy-engine"), "copies between peers take no multiprocessor from compute"
        reason = "without peer access; copies through host memory take no multiprocessor"
        return replace(spec, name="host-staged"), reason
    if saving < _WORTHWHILE_SAVING:
        limit = f"alltoall is taken from {_WORTHWHILE_SAVING:.0%}"
        return replace(spec, name="allgather"), f"{fact}: exact routing would save {saving:.0%} of the bytes, {limit}"
    return replace(spec, name="alltoall"), f"{fact}: exact routing saves {saving:.0%} of the bytes"


def _check_fit(name: str, num_ranks: int, device_kind: str, peer_access: bool) -> None:
    if name == "local":
        raise OptionError(f"transport 'local' works on one rank, not on {num_ranks}; use auto, alltoall or allgather")
    if name in _CUDA_ONLY and device_kind != "cuda":
        raise OptionError(f"transport {name!r} moves data by the copy engines of GPUs; on CPUs use auto or alltoall")
    if name == "shared-memory" and device_kind == "cuda":
        raise OptionError("transport 'shared-memory' works on CPUs; on GPUs use auto or host-staged")
    if name == "copy-engine" and not peer_access:
        raise OptionError(
            "transport 'copy-engine' needs peer access, which --no-peer-access or NCCL_P2P_DISABLE=1 forbids; "
            "use host-staged"
        )


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
    """Make the transport of this rank. Every rank must make the same one, at the same time: some meet their peers.

    max_tokens: the most tokens that one lane of one rank ever sends; some transports allocate for as many.
    peer_access: whether GPUs may copy into each other's memory, if they can; the environment variable
        NCCL_P2P_DISABLE=1 forbids it too.
    Raises `OptionError` for an unknown name, a class that cannot be loaded, or ranks that the transport cannot serve.
    """
    spec = parse_transport(spec) if isinstance(spec, str) else spec
    device_kind = streams.device.type
    allowed = peer_access and not peers_forbidden(os.environ)
    reached = _peers_reach(group, streams.device, allowed=allowed)
    # A transport that was named is tried, whatever the driver says: its error says what the machine lacks.
    peer_access = reached if spec.name == "auto" else allowed
    spec, _ = choose_transport(spec, shape, group.size, device_kind=device_kind, peer_access=peer_access)
    kind = load_transport(spec, device_kind)
    settings: dict[str, Any] = {} if spec.ctas is None else {"max_ctas": spec.ctas}
    transport = kind(shape, group=group, streams=streams, num_lanes=num_lanes, max_tokens=max_tokens, **settings)
    transport.peers_reach = reached
    if spec.link is None:
        return transport
    from antiphon.comm.simulated import SimulatedTransport  # only where it is asked for

    return SimulatedTransport(transport, spec.link)


def _peers_reach(group: RankGroup, device: torch.device, *, allowed: bool) -> bool:
    """Whether all devices may and can access each other's memory, asked on every rank: each sees its own side only."""
    if device.type != "cuda" or group.size == 1:
        return False
    from antiphon.machine.cuda import identity, reaches  # only where there are such devices

    devices = group.all_gather_object(identity(device.index))
    return all(group.all_gather_object(allowed and reaches(device, devices)))


def load_transport(spec: TransportSpec, device_type: str = "cpu") -> type[Transport]:
    """The class behind a name that is not `auto`. Raises `OptionError` if it cannot be loaded."""
    path = _CUDA_CLASSES.get(spec.name) if device_type == "cuda" else None
    path = path or _CLASSES.get(spec.name, spec.name)
    module_name, _, class_name = path.partition(":")
    try:
        loaded = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        remedy = "install cuda-bindings" if spec.name in _CLASSES else "check the path and PYTHONPATH"
        raise OptionError(f"transport {path!r} cannot be loaded: {error}; {remedy}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Transport)):
        raise OptionError(f"transport {path!r} is not a subclass of antiphon.comm.Transport")
    return loaded
