"""Advice on what is slow on a machine or likely to fail later, and the formatting of its figures."""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.kernels.dispatch import LAUNCH_COST, LAUNCH_REMEDY
from antiphon.machine.facts import UNLIMITED, Facts


@dataclass(frozen=True, slots=True)
class Advice:
    """Something that is wrong or slow, and its remedy ("" if there is none)."""

    fact: str
    remedy: str = ""


def advise(facts: Facts, *, ranks: int, device_kind: str) -> list[Advice]:
    """Problems that rule out no transport, but are likely to be slow or to fail later."""
    advice = []
    if device_kind == "cuda":
        for device in facts.gpus.devices[:ranks]:
            node = device.numa_node
            near = next((found.cpus for found in facts.numa.nodes if found.index == node), ())
            if near and facts.numa.affinity and not set(near) & set(facts.numa.affinity):
                fact = (
                    f"this process may not run on any CPU of NUMA node {node}, which GPU {device.index} is attached to"
                )
                remedy = f"start it with `numactl --cpunodebind={node}`"
                remedy += for_docker(facts, f"--cpuset-cpus={format_cpus(near)}")
                advice.append(Advice(f"{fact}: copies through host memory cross NUMA nodes", remedy))
        if facts.gpus.direct_launches.ok is False:
            fact = f"kernels are launched through Triton's own launcher, because {facts.gpus.direct_launches.detail}"
            advice.append(Advice(f"{fact}: {LAUNCH_COST}", LAUNCH_REMEDY))
        settings = facts.environment.get("PYTORCH_ALLOC_CONF", "") + facts.environment.get(
            "PYTORCH_CUDA_ALLOC_CONF", ""
        )
        if "expandable_segments:true" in settings.lower() and facts.host.pidfd_getfd.ok is False:
            fact = f"PyTorch's expandable segments cannot be shared: pidfd_getfd says {facts.host.pidfd_getfd.detail}"
            remedy = "leave expandable_segments out of PYTORCH_ALLOC_CONF" + for_docker(facts, "--cap-add=SYS_PTRACE")
            advice.append(Advice(fact, remedy))
    return advice


def format_bytes(num_bytes: int | None) -> str:
    """A size in the largest binary unit in which it is at least 1."""
    if num_bytes is None:
        return "unknown"
    if num_bytes == UNLIMITED:
        return "unlimited"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            number = num_bytes / size
            return f"{number:.0f} {unit}" if number >= 100 or number == int(number) else f"{number:.1f} {unit}"
    return f"{num_bytes} bytes"


def format_count(number: int, thing: str) -> str:
    """A number of things: "1 rank", "2 ranks"."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def format_cpus(cpus: tuple[int, ...]) -> str:
    """CPU numbers as ranges: 0-3,8 for (0, 1, 2, 3, 8)."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def for_docker(facts: Facts, flag: str) -> str:
    """The Docker flag to add to a remedy; empty outside a container."""
    return f" (docker: {flag})" if facts.host.container else ""
