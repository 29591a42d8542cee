"""Which transports are usable, from made-up facts, with one row for every reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from antiphon.comm import ExpertShape, Usability, World, usable_transports
from antiphon.comm.slab.transport import slab_bytes
from antiphon.core.errors import OptionError
from antiphon.machine.advice import advise, format_bytes
from antiphon.machine.facts import UNLIMITED, Check, Facts, Gpu, Gpus, Host, Numa, NumaNode, Peer, Versions
from tests.support.errors import raises

MIB, GIB = 1 << 20, 1 << 30
WORKS = Check(ok=True, detail="tried")
ALL = ("local", "allgather", "alltoall", "copy-engine", "one-sided", "host-staged", "shared-memory", "simulated")


def gpus(count: int = 2, **changes: Any) -> Gpus:
    device = Gpu(
        index=0,
        name="H200",
        capability="9.0",
        memory_total_bytes=141 * GIB,
        stream_memory_operations=WORKS,
        numa_node=0,
    )
    pairs = [(s, t) for s in range(count) for t in range(count) if s != t]
    found = Gpus(
        devices=tuple(replace(device, index=index) for index in range(count)),
        peers=tuple(Peer(source=s, target=t, access=True, link="NV18") for s, t in pairs),
        pinned_memory=WORKS,
        pinned_bytes=16 * MIB,
    )
    return replace(found, **changes)


HOST = Host(
    container="docker",
    locked_memory_bytes=8 * MIB,
    memory_total_bytes=256 * GIB,
    memory_available_bytes=200 * GIB,
    cgroup_limit_bytes=UNLIMITED,
    cgroup_free_bytes=UNLIMITED,
    shm_total_bytes=16 * GIB,
    shm_free_bytes=16 * GIB,
    memfd=WORKS,
    socket_descriptors=WORKS,
    pidfd_getfd=WORKS,
)
VERSIONS = Versions(
    python="3.12", torch="2.11", nccl="2.28.9", triton="3.6.0", cuda_bindings="13.0", backends=("gloo", "nccl")
)


def facts(
    *,
    gpus: Gpus = gpus(),  # noqa: B008  frozen
    numa: Numa = Numa(),  # noqa: B008
    environment: dict[str, str] | None = None,
    versions: dict[str, Any] | None = None,
    **host: Any,
) -> Facts:
    return Facts(
        versions=replace(VERSIONS, **(versions or {})),
        gpus=gpus,
        host=replace(HOST, **host),
        numa=numa,
        environment=environment or {},
    )


def find(name: str, found: list[Usability]) -> Usability:
    (one,) = [usability for usability in found if usability.name == name]
    return one


def without_peers(access: bool | None = False, link: str | None = "SYS") -> Gpus:
    pairs = [Peer(source=s, target=t, access=access, link=link) for s, t in ((0, 1), (1, 0))]
    return gpus(peers=tuple(pairs))


def with_flags(check: Check) -> Gpus:
    first, second = gpus().devices
    return gpus(devices=(first, replace(second, stream_memory_operations=check)))


UNKNOWN = Check(ok=None)
FAILED = Check(ok=False, detail="Operation not permitted")
NCCL = ("allgather", "alltoall")

GPU_CASES: list[tuple[str, Facts, tuple[str, ...], bool, str, str]] = [
    ("all is well", facts(), NCCL, True, "over NCCL 2.28.9, by peer access (NV18)", ""),
    ("all is well", facts(), ("copy-engine",), True, "peer access between all 2 GPUs (NV18), no SMs", ""),
    ("all is well", facts(), ("one-sided",), True, "all 2 GPUs (NV18), SMs only for small exchanges", ""),
    ("all is well", facts(), ("host-staged",), True, "of pinned host memory, SMs only for small exchanges", ""),
    ("no Triton", facts(versions={"triton": None}), ("copy-engine",), True, "no SMs", ""),
    ("no Triton", facts(versions={"triton": None}), ("host-staged",), True, "GiB of pinned host memory, no SMs", ""),
    (
        "no Triton",
        facts(versions={"triton": None}),
        ("one-sided",),
        False,
        "Triton, which compiles",
        "or use copy-engine",
    ),
    ("all is well", facts(), ("shared-memory",), False, "needs CPUs, and the ranks run on GPUs", "use host-staged"),
    ("all is well", facts(), ("local",), False, "serves a single rank: there are 2", "--ranks 1"),
    (
        "all is well",
        facts(),
        ("simulated",),
        True,
        "wraps allgather or alltoall or copy-engine or one-sided or host-staged",
        "",
    ),
    (
        "one GPU",
        facts(gpus=gpus(1)),
        (*NCCL, "copy-engine", "host-staged"),
        False,
        "2 ranks need 2 GPUs: there are 1",
        "check CUDA_VISIBLE_DEVICES (docker: --gpus all)",
    ),
    ("one GPU", facts(gpus=gpus(1)), ("simulated",), False, "no usable transport to wrap", "see those above"),
    (
        "driver",
        facts(gpus=Gpus(problem="unknown: it hung")),
        ("copy-engine",),
        False,
        "there are 0 (unknown: it hung)",
        "CUDA_VISIBLE",
    ),
    ("no NCCL", facts(versions={"backends": ("gloo",)}), NCCL, False, "built without nccl", "another build of torch"),
    ("NCCL's version", facts(versions={"nccl": None}), NCCL, True, "over NCCL (version unknown), by peer", ""),
    # peer access
    (
        "variable",
        facts(environment={"NCCL_P2P_DISABLE": "1"}),
        ("copy-engine",),
        False,
        "forbidden by NCCL_P2P_DISABLE",
        "unset that variable",
    ),
    ("variable 0", facts(environment={"NCCL_P2P_DISABLE": "0"}), ("copy-engine",), True, "peer access between", ""),
    (
        "variable",
        facts(environment={"NCCL_P2P_DISABLE": "1"}),
        NCCL,
        True,
        "through host memory (16 GiB free in /dev/shm)",
        "",
    ),
    (
        "no access",
        facts(gpus=without_peers()),
        ("copy-engine",),
        False,
        "GPU 0 cannot access GPU 1 (link SYS)",
        "use host-staged",
    ),
    (
        "no access",
        facts(gpus=without_peers(link=None)),
        ("copy-engine",),
        False,
        "GPU 0 cannot access GPU 1",
        "use host-staged",
    ),
    ("no access", facts(gpus=without_peers()), ("host-staged",), True, "of pinned host memory", ""),
    (
        "access unknown",
        facts(gpus=without_peers(access=None)),
        ("copy-engine",),
        False,
        "unknown whether GPU 0 can access GPU 1",
        "use host-staged",
    ),
    # NCCL's shared memory
    (
        "small shm",
        facts(gpus=without_peers(), shm_free_bytes=64 * MIB),
        NCCL,
        True,
        "without peer access NCCL needs /dev/shm, which has 64 MiB free",
        "docker: --shm-size=1g or --ipc=host",
    ),
    (
        "no shm",
        facts(gpus=without_peers(), shm_free_bytes=MIB),
        NCCL,
        False,
        "NCCL needs /dev/shm: it has 1 MiB free",
        "--shm-size=1g",
    ),
    (
        "no shm, no container",
        facts(gpus=without_peers(), shm_free_bytes=MIB, container=""),
        NCCL,
        False,
        "1 MiB free",
        "`mount -o remount,size=1G /dev/shm`",
    ),
    ("small shm does not matter with peers", facts(shm_free_bytes=MIB), NCCL, True, "by peer access", ""),
    (
        "shm unknown",
        facts(gpus=without_peers(), shm_free_bytes=None),
        NCCL,
        True,
        "through host memory (/dev/shm of unknown size)",
        "",
    ),
    (
        "sockets",
        facts(gpus=without_peers(), environment={"NCCL_SHM_DISABLE": "1"}),
        NCCL,
        True,
        "over sockets, which is slow",
        "unset NCCL_SHM_DISABLE",
    ),
    # flags
    (
        "no bindings",
        facts(versions={"cuda_bindings": None}),
        ("copy-engine", "host-staged"),
        False,
        "cuda-bindings is missing",
        "`pip install cuda-bindings`",
    ),
    (
        "no flags",
        facts(gpus=with_flags(FAILED)),
        ("copy-engine", "host-staged"),
        False,
        "no stream memory operations on GPU 1 (Operation not permitted)",
        "alltoall",
    ),
    (
        "flags unknown",
        facts(gpus=with_flags(UNKNOWN)),
        ("copy-engine", "host-staged"),
        False,
        "unknown: stream memory operations on GPU 1",
        "alltoall",
    ),
    # descriptors, memory
    (
        "no descriptors",
        facts(socket_descriptors=FAILED),
        ("copy-engine", "host-staged"),
        False,
        "no descriptors over Unix sockets (Operation not permitted)",
        "sandbox",
    ),
    ("pidfd_getfd is not needed", facts(pidfd_getfd=FAILED), ("copy-engine", "host-staged"), True, "", ""),
    ("no memfd", facts(memfd=FAILED), ("host-staged",), False, "no shared memory by memfd_create", "memfd_create"),
    ("no memfd", facts(memfd=FAILED), ("copy-engine",), True, "peer access", ""),
    (
        "not pinned",
        facts(gpus=gpus(pinned_memory=FAILED)),
        ("host-staged",),
        False,
        "no pinning of shared host memory (Operation not permitted)",
        "raise the limit on locked memory (8 MiB): `ulimit -l unlimited` (docker: --ulimit memlock=-1)",
    ),
    (
        "pinning unknown",
        facts(gpus=gpus(pinned_memory=UNKNOWN)),
        ("host-staged",),
        False,
        "unknown: pinning",
        "memlock=-1",
    ),
    (
        "the limit may bind",
        facts(gpus=gpus(pinned_bytes=256 * MIB), locked_memory_bytes=512 * MIB),
        ("host-staged",),
        True,
        "tested with 256 MiB, but the limit on locked memory may be too low",
        "raise the limit on locked memory (512 MiB)",
    ),
    (
        "the limit is enough",
        facts(gpus=gpus(pinned_bytes=256 * MIB), locked_memory_bytes=64 * GIB),
        ("host-staged",),
        True,
        "of pinned",
        "",
    ),
    ("no limit", facts(locked_memory_bytes=UNLIMITED), ("host-staged",), True, "of pinned", ""),
    (
        "little memory",
        facts(memory_available_bytes=GIB),
        ("host-staged",),
        False,
        "of host memory, and 1 GiB is free",
        "use fewer tokens per step",
    ),
    (
        "small group",
        facts(cgroup_limit_bytes=2 * GIB, cgroup_free_bytes=256 * MIB),
        ("host-staged",),
        False,
        "of host memory, and 256 MiB is free",
        "use fewer tokens per step, or raise the limit of 2 GiB (docker: --memory)",
    ),
    (
        "nothing known of memory",
        facts(memory_available_bytes=None, cgroup_free_bytes=None),
        ("host-staged",),
        True,
        "of pinned",
        "",
    ),
    (
        "several lacks are all named",
        facts(gpus=gpus(pinned_memory=FAILED), memfd=FAILED),
        ("host-staged",),
        False,
        "no shared memory by memfd_create (Operation not permitted); no pinning of",
        "memfd_create; raise the limit",
    ),
]


@pytest.mark.parametrize(("case", "known", "names", "usable", "reason", "remedy"), GPU_CASES)
def test_two_ranks_on_gpus(
    case: str, known: Facts, names: tuple[str, ...], usable: bool, reason: str, remedy: str
) -> None:
    found = usable_transports(known, ranks=2, device_kind="cuda")
    assert tuple(usability.name for usability in found) == ALL
    for name in names:
        one = find(name, found)
        assert one.usable is usable, (case, one)
        assert reason in one.reason
        assert remedy in one.remedy
        assert bool(one.remedy) == bool(remedy)


def test_peer_access_can_be_forbidden() -> None:
    found = usable_transports(facts(), ranks=2, device_kind="cuda", peer_access=False)
    one = find("copy-engine", found)
    assert (one.usable, one.reason) == (False, "peer access is forbidden by --no-peer-access")
    assert "drop that option" in one.remedy and "host-staged" in one.remedy
    assert find("host-staged", found).usable
    assert "through host memory" in find("alltoall", found).reason


def test_only_the_gpus_of_the_ranks_count() -> None:
    four = gpus(4)
    peers = tuple(replace(p, access=p.source < 2 and p.target < 2, link="SYS") for p in four.peers)
    devices = (*four.devices[:3], replace(four.devices[3], stream_memory_operations=FAILED))
    known = facts(gpus=replace(four, peers=peers, devices=devices))
    assert find("copy-engine", usable_transports(known, ranks=2, device_kind="cuda")).usable
    found = find("copy-engine", usable_transports(known, ranks=4, device_kind="cuda"))
    assert found.reason.startswith("GPU 0 cannot access GPU 2 (link SYS); no stream memory operations on GPU 3")


def test_more_ranks_than_gpus_name_the_most_that_can_be_had() -> None:
    found = find("alltoall", usable_transports(facts(), ranks=3, device_kind="cuda"))
    assert found.remedy == "use --ranks 2, or check CUDA_VISIBLE_DEVICES (docker: --gpus all)"


CPU_CASES: list[tuple[Facts, str, bool, str, str]] = [
    (facts(), "allgather", True, "over gloo", ""),
    (facts(), "alltoall", True, "over gloo", ""),
    (facts(versions={"backends": ()}), "alltoall", False, "built without gloo", "another build"),
    (facts(), "copy-engine", False, "needs GPUs, and the ranks run on CPUs", "use shared-memory"),
    (facts(), "host-staged", False, "needs GPUs, and the ranks run on CPUs", "use shared-memory"),
    (facts(), "shared-memory", True, "memory that the processes of this host share", ""),
    (facts(memfd=FAILED), "shared-memory", False, "no shared memory by memfd_create", "Linux"),
    (facts(socket_descriptors=UNKNOWN), "shared-memory", False, "unknown: descriptors over Unix", "sandbox"),
    (facts(memory_available_bytes=MIB), "shared-memory", True, "memory that the processes", ""),
    (facts(), "simulated", True, "wraps allgather or alltoall or shared-memory", ""),
]


@pytest.mark.parametrize(("known", "name", "usable", "reason", "remedy"), CPU_CASES)
def test_two_ranks_on_cpus(known: Facts, name: str, usable: bool, reason: str, remedy: str) -> None:
    one = find(name, usable_transports(known, ranks=2, device_kind="cpu"))
    assert one.usable is usable
    assert reason in one.reason and remedy in one.remedy
    assert bool(one.remedy) == bool(remedy)


def test_the_size_of_the_slabs_may_be_given() -> None:
    known = facts(memory_available_bytes=MIB)
    assert not find("shared-memory", usable_transports(known, ranks=2, device_kind="cpu", shared_bytes=2 * MIB)).usable
    found = usable_transports(known, ranks=2, device_kind="cuda", shared_bytes=MIB)
    assert find("host-staged", found).reason.startswith("1 MiB of pinned host memory")


@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
def test_one_rank_is_local(device_kind: str) -> None:
    found = usable_transports(facts(gpus=gpus(1)), ranks=1, device_kind=device_kind)
    assert [usability.name for usability in found if usability.usable] == ["local", "simulated"]
    assert find("alltoall", found).reason == "a single rank sends nothing and uses local"
    assert find("simulated", found).reason.startswith("wraps local")


@pytest.mark.parametrize(
    ("ranks", "device_kind", "option", "value", "remedy"),
    [(0, "cpu", "ranks", 0, "1"), (2, "gpu", "device_kind", "gpu", "cuda")],
)
def test_a_question_without_sense_is_an_error(
    ranks: int, device_kind: str, option: str, value: object, remedy: str
) -> None:
    with raises(OptionError, option=option, value=value, remedy=remedy):
        usable_transports(facts(), ranks=ranks, device_kind=device_kind)


def test_slabs_hold_tokens_once_and_sums_for_every_rank() -> None:
    shape = ExpertShape(num_experts=8, top_k=2, hidden_size=100, dtype=torch.bfloat16)
    row_bytes = 224  # 200 of the state, 8 of weights, 8 of ids, up to a multiple of 16
    world = World(ranks=2, device_kind="cuda", num_lanes=3, max_tokens=10)
    assert slab_bytes(shape, world) == 2 * 3 * 10 * (row_bytes + 2 * 200)
    assert slab_bytes(shape, replace(world, ranks=1)) == 0
    assert slab_bytes(shape, replace(world, host_bytes=77)) == 77


# ---- advice

TWO_NODES = (NumaNode(index=0, cpus=(0, 1, 2, 3)), NumaNode(index=1, cpus=(4, 5, 6, 7)))


@pytest.mark.parametrize(
    ("nodes", "affinity", "num_found"),
    [
        (TWO_NODES, (4, 5), 2),  # both GPUs are at node 0
        (TWO_NODES, (3, 4), 0),
        (TWO_NODES, (), 0),
        ((), (4, 5), 0),
    ],
)
def test_a_process_bound_away_from_its_gpu(
    nodes: tuple[NumaNode, ...], affinity: tuple[int, ...], num_found: int
) -> None:
    known = facts(numa=Numa(nodes=nodes, affinity=affinity))
    advice = advise(known, ranks=2, device_kind="cuda")
    assert len(advice) == num_found
    if advice:
        assert "not run on any CPU of NUMA node 0, which GPU 0 is" in advice[0].fact
        assert advice[0].remedy == "start it with `numactl --cpunodebind=0` (docker: --cpuset-cpus=0-3)"
    assert advise(known, ranks=2, device_kind="cpu") == []


def test_expandable_segments_need_pidfd_getfd() -> None:
    setting = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native,expandable_segments:True"}
    (advice,) = advise(facts(environment=setting, pidfd_getfd=FAILED), ranks=2, device_kind="cuda")
    assert "pidfd_getfd says Operation not permitted" in advice.fact
    assert advice.remedy.endswith("(docker: --cap-add=SYS_PTRACE)")
    assert advise(facts(environment=setting), ranks=2, device_kind="cuda") == []
    assert advise(facts(pidfd_getfd=FAILED), ranks=2, device_kind="cuda") == []


def test_launches_through_triton_are_advised_against() -> None:
    unknown = gpus(direct_launches=Check(ok=False, detail="the launcher of Triton 3.99.0 is not known"))
    (advice,) = advise(facts(gpus=unknown), ranks=2, device_kind="cuda")
    assert "through Triton's own launcher, because the launcher of Triton 3.99.0 is not known: " in advice.fact
    assert "16 to 45 us" in advice.fact and "torch 2.11 to 2.14" in advice.remedy
    assert advise(facts(gpus=unknown), ranks=2, device_kind="cpu") == []
    for check in (Check(ok=None, detail="Triton cannot be asked"), Check(ok=True)):
        assert advise(facts(gpus=gpus(direct_launches=check)), ranks=2, device_kind="cuda") == []


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (None, "unknown"),
        (UNLIMITED, "unlimited"),
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (64 << 10, "64 KiB"),
        (3 << 19, "1.5 MiB"),
        (141 * GIB + 1, "141 GiB"),
    ],
)
def test_sizes_read_well(num_bytes: int | None, text: str) -> None:
    assert format_bytes(num_bytes) == text
