"""What `antiphon doctor` prints: of made-up machines word by word, and of the machine that runs the tests."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

import antiphon
from antiphon.cli.doctor import describe, run_doctor
from antiphon.core.errors import OptionError
from antiphon.machine.facts import UNLIMITED, Check, Facts, Gpu, Gpus, Host, Numa, NumaNode, Peer, Versions
from tests.support.errors import raises

GIB = 1 << 30
WORKS = Check(ok=True, detail="tried")

DEVICE = Gpu(
    index=0,
    name="NVIDIA H200",
    capability="9.0",
    memory_total_bytes=140 * GIB,
    memory_free_bytes=139 * GIB,
    pci="0000:18:00.0",
    numa_node=0,
    stream_memory_operations=WORKS,
    flushes_remote_writes=True,
)
TWO_GPUS = Facts(
    versions=Versions(
        python="3.12.3",
        torch="2.11.0+cu130",
        cuda="13.0",
        driver="580.95.05",
        nccl="2.28.9",
        triton="3.6.0",
        greenlet="3.5.6",
        cuda_bindings="13.0.3",
        backends=("gloo", "nccl"),
    ),
    gpus=Gpus(
        devices=(DEVICE, replace(DEVICE, index=1, numa_node=None)),
        peers=(
            Peer(source=0, target=1, access=True, link="NV18"),
            Peer(source=1, target=0, access=True, link="NV18"),
        ),
        pinned_memory=Check(ok=True, detail="16 MiB of shared host memory were pinned"),
        pinned_bytes=16 << 20,
        direct_launches=Check(ok=True),
    ),
    host=Host(
        container="docker",
        locked_memory_bytes=64 << 10,
        memory_total_bytes=256 * GIB,
        memory_available_bytes=250 * GIB,
        cgroup_limit_bytes=128 * GIB,
        cgroup_free_bytes=100 * GIB,
        shm_total_bytes=64 << 20,
        shm_free_bytes=64 << 20,
        memfd=WORKS,
        socket_descriptors=WORKS,
        pidfd_getfd=Check(ok=False, detail="Operation not permitted"),
        ptrace_scope=1,
    ),
    numa=Numa(nodes=(NumaNode(index=0, cpus=(0, 1, 2, 3, 8)), NumaNode(index=1, cpus=(4,))), affinity=(4,)),
    environment={"NCCL_P2P_DISABLE": "1"},
)
NOTHING_KNOWN = Facts(
    versions=Versions(python="3.12.3", torch="2.11.0"), gpus=Gpus(), host=Host(), numa=Numa(), environment={}
)


def printed(facts: Facts, **options: Any) -> tuple[int, str]:
    output = io.StringIO()
    code = run_doctor(Console(file=output, width=120), examine=lambda: facts, **options)
    return code, output.getvalue()


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_two_gpus_in_a_container() -> None:
    code, text = printed(TWO_GPUS)
    lines = lines_of(text)
    assert code == 0
    assert lines[0] == f"antiphon {antiphon.__version__}: 2 ranks on GPUs"
    for line in (
        "CUDA 13.0, driver 580.95.05, NCCL 2.28.9, cuda-bindings 13.0.3",
        "GPUs 0: NVIDIA H200, compute capability 9.0, 139 GiB free of 140 GiB, PCI 0000:18:00.0, NUMA node 0",
        "peer access 0-1: yes (NV18)",
        "stream flags stream memory operations: yes; waits can flush remote writes: yes",
        "pinned memory yes (16 MiB of shared host memory were pinned)",
        "kernels direct launches: yes",
        "host memory 250 GiB available of 256 GiB, cgroup limit 128 GiB (100 GiB left)",
        "locked memory limit 64 KiB",
        "/dev/shm: 64 MiB free of 64 MiB",
        "by pidfd_getfd: no (Operation not permitted), ptrace_scope 1",
        "NUMA node 0: CPUs 0-3,8, node 1: CPUs 4; this process may use CPUs 4",
        "environment NCCL_P2P_DISABLE=1",
        "copy-engine no peer access is forbidden by NCCL_P2P_DISABLE",
        "remedy: unset that variable, or use host-staged",
        "remedy: docker: --shm-size=1g or --ipc=host",
        "advice",
        "remedy: start it with `numactl --cpunodebind=0` (docker: --cpuset-cpus=0-3,8)",
    ):
        assert line in lines, line
    assert any(line.startswith("host-staged yes ") for line in lines)
    (remedy_after_copy_engine,) = [lines[place + 1] for place, line in enumerate(lines) if line.startswith("copy-")]
    assert remedy_after_copy_engine == "remedy: unset that variable, or use host-staged"


def test_launches_through_triton_are_said_with_their_cost() -> None:
    unknown = Check(ok=False, detail="the launcher of Triton 3.99.0 is not known, only those of 3.6")
    code, text = printed(replace(TWO_GPUS, gpus=replace(TWO_GPUS.gpus, direct_launches=unknown)))
    said = " ".join(text.split())
    assert code == 0
    assert "kernels direct launches: no (the launcher of Triton 3.99.0 is not known, only those of 3.6)" in said
    assert "through Triton's own launcher, because the launcher of Triton 3.99.0 is not known" in said
    assert "16 to 45 us" in said and "remedy: use torch 2.11 to 2.14 with the Triton" in said


def test_columns_are_aligned_and_nothing_is_cut_off() -> None:
    output = io.StringIO()
    run_doctor(Console(file=output, width=60), examine=lambda: TWO_GPUS)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    place = lines.index("transports")
    rows = [line for line in lines[place + 1 :] if line[15:].strip()]
    assert {line[2:15].strip() for line in rows} >= {"copy-engine", "host-staged", ""}
    assert all(line.split()[1] in ("yes", "no") for line in rows if line[2:15].strip() in ("alltoall", "copy-engine"))
    assert "peer access is forbidden by NCCL_P2P_DISABLE" in " ".join(output.getvalue().split())


def test_what_is_unknown_is_said_to_be_unknown() -> None:
    code, text = printed(NOTHING_KNOWN)
    assert code == 1  # without a backend of collectives and without shared memory no transport is left
    lines = lines_of(text)
    assert "GPUs none: reason unknown" in lines
    assert "container unknown" in lines
    assert "host memory unknown available of unknown, cgroup limit unknown" in lines
    assert "locked memory limit unknown" in lines
    assert "NUMA nodes unknown; this process may use unknown CPUs" in lines
    assert "advice" not in lines


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ({}, "all 6 pairs: yes (NV18)"),
        ({(0, 1): (False, "SYS"), (1, 0): (False, "SYS")}, "0-1: no (SYS), 0-2 0-3 1-2 1-3 2-3: yes (NV18)"),
        ({(1, 0): (False, None)}, "0-1: one way only (NV18), 0-2 0-3 1-2 1-3 2-3: yes (NV18)"),
        ({(2, 3): (None, None), (3, 2): (None, None)}, "2-3: unknown (link unknown), 0-1 0-2 0-3 1-2 1-3: yes (NV18)"),
    ],
)
def test_pairs_of_one_kind_share_a_line(
    answers: dict[tuple[int, int], tuple[bool | None, str | None]], line: str
) -> None:
    peers = []
    for pair in [(s, t) for s in range(4) for t in range(4) if s != t]:
        access, link = answers.get(pair, (True, "NV18"))
        peers.append(Peer(source=pair[0], target=pair[1], access=access, link=link))
    devices = tuple(replace(DEVICE, index=index) for index in range(4))
    facts = replace(TWO_GPUS, gpus=replace(TWO_GPUS.gpus, devices=devices, peers=tuple(peers)))
    assert dict(describe(facts))["peer access"] == line


def test_no_limits_and_no_container() -> None:
    host = replace(
        TWO_GPUS.host,
        container="",
        locked_memory_bytes=UNLIMITED,
        cgroup_limit_bytes=UNLIMITED,
        cgroup_free_bytes=UNLIMITED,
    )
    found = dict(describe(replace(TWO_GPUS, host=host)))
    assert found["container"] == "none"
    assert found["locked memory"] == "limit unlimited"
    assert found["host memory"].endswith("no cgroup limit")


def test_ranks_without_a_device_end_with_code_1() -> None:
    code, text = printed(TWO_GPUS, ranks=3)
    assert code == 1
    assert "3 ranks need 3 GPUs: there are 2" in text
    assert printed(TWO_GPUS, ranks=1)[0] == 0
    with raises(OptionError, "ranks=0"):
        printed(TWO_GPUS, ranks=0)


def test_json_holds_answers_and_facts() -> None:
    code, text = printed(replace(TWO_GPUS, environment={}), as_json=True, peer_access=False)
    assert code == 0
    (line,) = text.splitlines()
    report = json.loads(line)
    assert (report["ranks"], report["device_kind"], report["peer_access"]) == (2, "cuda", False)
    answers = {found["name"]: found for found in report["transports"]}
    assert answers["copy-engine"]["reason"] == "peer access is forbidden by --no-peer-access"
    assert answers["host-staged"]["usable"] is True
    assert len(report["advice"]) == 1
    assert report["facts"]["gpus"]["devices"][1]["numa_node"] is None
    assert report["facts"]["host"]["pidfd_getfd"] == {"ok": False, "detail": "Operation not permitted"}


# ---- this machine, through the command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "antiphon.cli", "doctor", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)


def test_the_command_on_this_machine_without_gpus() -> None:
    ended = run("--json", "--ranks", "2")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["facts"]["versions"]["torch"] == torch.__version__
    assert (report["device_kind"], report["ranks"]) == ("cpu", 2)
    usable = {found["name"] for found in report["transports"] if found["usable"]}
    assert usable >= {"allgather", "alltoall", "simulated"}
    assert not usable & {"local", "copy-engine", "host-staged"}


def test_the_command_for_people() -> None:
    ended = run("--ranks", "1", "--no-peer-access")
    assert ended.returncode == 0, ended.stderr
    assert "1 rank on CPUs" in ended.stdout
    assert any(line.split()[:2] == ["local", "yes"] for line in ended.stdout.splitlines() if line)


def test_a_wrong_number_of_ranks_is_one_line() -> None:
    ended = run("--ranks", "0")
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: ranks=0 is out of range; use an integer of at least 1"]
