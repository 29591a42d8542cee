"""`antiphon doctor`: what this machine supports, which transports work, and what would help.

This module only prints: `machine` examines the host, and each transport says whether it can run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import groupby

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

import antiphon
from antiphon.comm import Usability, usable_transports
from antiphon.config.options import OPTION_DEFAULTS
from antiphon.config.resolve import resolve_device
from antiphon.device.table import find_device
from antiphon.kernels.attention import AUTO_ORDER, AttentionShape, refusals
from antiphon.kernels.dispatch import no_cuda_kernels
from antiphon.machine.advice import Advice, advise, format_bytes, format_count, format_cpus
from antiphon.machine.facts import UNLIMITED, Check, Facts, Gpus
from antiphon.machine.probe import examine_machine

_RANKS_WITHOUT_GPUS = 2
_COMMON_ATTENTION = AttentionShape(
    num_heads=32, num_kv_heads=4, key_size=128, value_size=128, scale=128**-0.5, latent=False
)


def run_doctor(
    console: Console,
    *,
    ranks: int | None = None,
    peer_access: bool = True,
    as_json: bool = False,
    examine: Callable[[], Facts] = examine_machine,
) -> int:
    """Print the findings, or one JSON object; 0 if some transport serves the ranks, else 1.

    ranks: by default one for every GPU, two without GPUs. Raises `OptionError` for a number below 1.
    """
    facts = examine()
    device_kind = "cuda" if facts.gpus.devices else "cpu"
    ranks = (len(facts.gpus.devices) or _RANKS_WITHOUT_GPUS) if ranks is None else ranks
    transports = usable_transports(facts, ranks=ranks, device_kind=device_kind, peer_access=peer_access)
    attention = _attention_refusals()
    advice = advise(facts, ranks=ranks, device_kind=device_kind)
    if as_json:
        report = {
            "antiphon": antiphon.__version__,
            "ranks": ranks,
            "device_kind": device_kind,
            "peer_access": peer_access,
            "transports": msgspec.to_builtins(transports),
            "attention_backends": attention,
            "advice": msgspec.to_builtins(advice),
            "facts": msgspec.to_builtins(facts),
        }
        console.out(json.dumps(report), highlight=False)
    else:
        where = "GPUs" if device_kind == "cuda" else "CPUs"
        console.print(
            Text(f"antiphon {antiphon.__version__}: {format_count(ranks, 'rank')} on {where}\n", style="bold")
        )
        console.print(_table(describe(facts)))
        console.print(Text("\ntransports", style="bold"))
        console.print(_transports_table(transports))
        console.print(Text("\nattention backends", style="bold"))
        console.print(_attention_table(attention))
        if advice:
            console.print(Text("\nadvice", style="bold"))
            console.print(_table(_with_remedies(advice)))
    return 0 if any(found.usable for found in transports) else 1


def describe(facts: Facts) -> list[tuple[str, str]]:
    """The facts as lines of heading and text. An empty heading continues the one above."""
    versions, host = facts.versions, facts.host
    lines = [
        ("versions", f"Python {versions.python}, torch {versions.torch}, backends {_listed(versions.backends)}"),
        ("", f"triton {_or_none(versions.triton)}, greenlet {_or_none(versions.greenlet)}"),
    ]
    if facts.gpus.devices or versions.cuda is not None:
        nvidia = {"CUDA": versions.cuda, "driver": versions.driver, "NCCL": versions.nccl}
        known = ", ".join(f"{name} {version or 'unknown'}" for name, version in nvidia.items())
        lines.append(("", f"{known}, cuda-bindings {_or_none(versions.cuda_bindings)}"))
    lines += _gpu_lines(facts.gpus)
    limit = "no cgroup limit"
    if host.cgroup_limit_bytes is None:
        limit = "cgroup limit unknown"
    elif host.cgroup_limit_bytes != UNLIMITED:
        limit = f"cgroup limit {format_bytes(host.cgroup_limit_bytes)}"
        limit += f" ({format_bytes(host.cgroup_free_bytes)} left)"
    memory = f"{format_bytes(host.memory_available_bytes)} available of {format_bytes(host.memory_total_bytes)}"
    lines += [
        ("container", "unknown" if host.container is None else host.container or "none"),
        ("host memory", f"{memory}, {limit}"),
        ("locked memory", f"limit {format_bytes(host.locked_memory_bytes)}"),
        ("shared memory", f"memfd_create: {_yes_or_no(host.memfd)}"),
        ("", f"/dev/shm: {format_bytes(host.shm_free_bytes)} free of {format_bytes(host.shm_total_bytes)}"),
        ("descriptors", f"over Unix sockets: {_yes_or_no(host.socket_descriptors)}"),
        ("", f"by pidfd_getfd: {_yes_or_no(host.pidfd_getfd)}{_scope(host.ptrace_scope)}"),
        ("NUMA", _numa_line(facts)),
    ]
    settings = ", ".join(f"{name}={value}" for name, value in facts.environment.items())
    return [*lines, ("environment", settings)] if settings else lines


def _gpu_lines(gpus: Gpus) -> Iterable[tuple[str, str]]:
    if not gpus.devices:
        yield "GPUs", f"none: {gpus.problem or 'reason unknown'}"
        return
    for device in gpus.devices:
        place = ", ".join(
            [f"PCI {device.pci}"] * (device.pci is not None)
            + [f"NUMA node {'unknown' if device.numa_node is None else device.numa_node}"]
        )
        room = f"{format_bytes(device.memory_free_bytes)} free of {format_bytes(device.memory_total_bytes)}"
        heading = "GPUs" if device is gpus.devices[0] else ""
        yield heading, f"{device.index}: {device.name}, compute capability {device.capability}, {room}, {place}"
    if gpus.peers:
        yield "peer access", _peer_line(gpus)
    checks = sorted({_yes_or_no(device.stream_memory_operations) for device in gpus.devices})
    flushes = {device.flushes_remote_writes for device in gpus.devices}
    flush = _answer(flushes.pop()) if len(flushes) == 1 else "not on all"
    yield "stream flags", f"stream memory operations: {'; '.join(checks)}; waits can flush remote writes: {flush}"
    yield "pinned memory", _yes_or_no(gpus.pinned_memory, always=True)
    yield "kernels", f"direct launches: {_yes_or_no(gpus.direct_launches)}"


def _peer_line(gpus: Gpus) -> str:
    """Each kind of pair once, with its pairs."""
    pairs: dict[tuple[int, int], list[tuple[bool | None, str | None]]] = {}
    for peer in gpus.peers:
        pairs.setdefault((min(peer.source, peer.target), max(peer.source, peer.target)), []).append(
            (peer.access, peer.link)
        )
    kinds = []
    for pair, ways in pairs.items():
        answers = {access for access, _ in ways}
        access = _answer(answers.pop()) if len(answers) == 1 else "one way only"
        link = next((link for _, link in ways if link), None)
        kinds.append((f"{access} ({link or 'link unknown'})", pair))
    parts = []
    for kind, group in groupby(sorted(kinds), key=lambda found: found[0]):
        members = [f"{first}-{second}" for _, (first, second) in group]
        which = f"all {len(pairs)} pairs" if len(members) == len(pairs) > 1 else " ".join(members)
        parts.append(f"{which}: {kind}")
    return ", ".join(parts)


def _numa_line(facts: Facts) -> str:
    numa = facts.numa
    nodes = ", ".join(f"node {node.index}: CPUs {format_cpus(node.cpus)}" for node in numa.nodes) or "nodes unknown"
    affinity = f"CPUs {format_cpus(numa.affinity)}" if numa.affinity else "unknown CPUs"
    return f"{nodes}; this process may use {affinity}"


def _transports_table(transports: list[Usability]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for found in transports:
        usable = Text("yes", style="green") if found.usable else Text("no", style="red")
        table.add_row(Text(f"  {found.name}"), usable, Text(found.reason))
        if found.remedy:
            table.add_row("", "", Text(f"remedy: {found.remedy}"))
    return table


def _attention_refusals() -> dict[str, str | None]:
    """Why each attention backend cannot be used here for the shape of common models; `None` for those that can."""
    device = find_device(resolve_device("auto", ranks=1)[0])
    with nullcontext() if device.fused_kernels else no_cuda_kernels():
        block_size = int(OPTION_DEFAULTS["block_size"])
        return refusals(_COMMON_ATTENTION, device.default_dtype, block_size, device.torch_device)


def _attention_table(found: dict[str, str | None]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    chosen = next(name for name in AUTO_ORDER if found[name] is None)
    for name, refusal in found.items():
        usable = Text("yes", style="green") if refusal is None else Text("no", style="red")
        table.add_row(Text(f"  {name}"), usable, Text(refusal or ("what auto chooses" if name == chosen else "")))
    return table


def _table(lines: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for heading, text in lines:
        table.add_row(Text(f"  {heading}"), Text(text))
    return table


def _with_remedies(advice: list[Advice]) -> Iterable[tuple[str, str]]:
    for found in advice:
        yield "-", found.fact
        if found.remedy:
            yield "", f"remedy: {found.remedy}"


def _yes_or_no(check: Check, *, always: bool = False) -> str:
    """An answer with its detail. always: even for a yes."""
    detail = f" ({check.detail})" if check.detail and (always or not check.ok) else ""
    return f"{_answer(check.ok)}{detail}"


def _answer(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]


def _or_none(version: str | None) -> str:
    return version or "none"


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names) or "none"


def _scope(ptrace_scope: int | None) -> str:
    return "" if ptrace_scope is None else f", ptrace_scope {ptrace_scope}"
