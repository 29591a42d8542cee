"""The probes, on made-up file systems and tool outputs and on the machine that runs the tests."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from antiphon.machine import cuda as machine_cuda
from antiphon.machine import host as machine_host
from antiphon.machine import probe as machine
from antiphon.machine.facts import UNLIMITED, Check, Gpu, Gpus, NumaNode, Peer

MIB = 1 << 20

GPU_LIST = "0, 00000000:18:00.0, 580.95.05\n1, 00000001:AB:00.0, 580.95.05\n"

TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPXB\t0-15\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tPIX\tSYS\t0-15\t0\t\tN/A\n"
    "GPU2\tSYS\tPIX\t X \tSYS\t16-31\t1\t\tN/A\n"
    "NIC0\tPXB\tSYS\tSYS\t X \t\t\t\t\n"
    "\nLegend:\n\n  X    = Self\n"
)


def tree(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


# ---- outputs of tools


def test_nvidia_smi_gives_driver_and_order() -> None:
    assert machine.parse_gpu_list(GPU_LIST) == ("580.95.05", {"0000:18:00.0": 0, "0001:ab:00.0": 1})
    assert machine.parse_gpu_list("No devices were found\n") == (None, {})


def test_topology_names_the_link_of_every_pair_of_gpus() -> None:
    links = machine.parse_topology(TOPOLOGY)
    assert links == {(0, 1): "NV18", (1, 0): "NV18", (0, 2): "SYS", (2, 0): "SYS", (1, 2): "PIX", (2, 1): "PIX"}
    assert machine.parse_topology("") == {}


def test_links_follow_the_pci_address_and_not_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's first device may be another one than nvidia-smi's."""
    monkeypatch.setattr(machine, "run_limited", lambda *_: (TOPOLOGY, ""))
    devices = tuple(
        Gpu(index=index, name="x", capability="9.0", memory_total_bytes=1, pci=pci)
        for index, pci in enumerate(["0000:02:00.0", "0000:01:00.0", None])
    )
    peers = (Peer(source=0, target=1, access=True), Peer(source=0, target=2, access=False))
    found = machine._with_links(Gpus(devices=devices, peers=peers), {"0000:01:00.0": 0, "0000:02:00.0": 2})
    assert [peer.link for peer in found.peers] == ["SYS", None]
    assert [peer.access for peer in found.peers] == [True, False]


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
        ("something else", None),
    ],
)
def test_the_kernel_names_the_driver(line: str, driver: str | None, tmp_path: Path) -> None:
    tree(tmp_path, {"proc/driver/nvidia/version": f"{line}\nGCC version: 12.2.0\n"})
    assert machine.probe_versions(root=tmp_path).driver == driver
    assert machine.probe_versions("600.1", root=tmp_path).driver == "600.1"


@pytest.mark.parametrize(("text", "cpus"), [("0-2,8\n", (0, 1, 2, 8)), ("5", (5,)), ("", ())])
def test_lists_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert machine_host.parse_cpu_list(text) == cpus


# ---- made-up file systems


def test_nothing_is_known_of_an_empty_file_system(tmp_path: Path) -> None:
    host = machine_host.probe_host(tmp_path)
    assert host.container is None and host.ptrace_scope is None
    assert (host.memory_total_bytes, host.memory_available_bytes) == (None, None)
    assert (host.cgroup_limit_bytes, host.cgroup_free_bytes) == (None, None)
    assert (host.shm_total_bytes, host.shm_free_bytes) == (None, None)
    assert machine_host.probe_numa(tmp_path).nodes == ()
    assert machine_host.numa_node_of("0000:18:00.0", tmp_path) is None


def test_memory_and_ptrace_scope_are_read(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal:       1024 kB\nMemFree: 1 kB\nMemAvailable:   512 kB\nHugePages_Total:   0\n",
        "proc/sys/kernel/yama/ptrace_scope": "1\n",
        "dev/shm/x": "",
    }
    host = machine_host.probe_host(tree(tmp_path, files))
    assert (host.memory_total_bytes, host.memory_available_bytes, host.ptrace_scope) == (MIB, MIB // 2, 1)
    assert (
        host.shm_total_bytes is not None and host.shm_total_bytes == machine_host.probe_host(tmp_path).shm_total_bytes
    )


@pytest.mark.parametrize(
    ("available_kib", "limit", "expected"),
    [(512, None, 512 * 1024), (512, "1000", 1000), (512, "9000000", 512 * 1024), (512, "max", 512 * 1024)],
)
def test_memory_that_can_still_be_had(tmp_path: Path, available_kib: int, limit: str | None, expected: int) -> None:
    files = {"proc/meminfo": f"MemTotal: 9999 kB\nMemAvailable: {available_kib} kB\n", "proc/self/cgroup": "0::/\n"}
    if limit is not None:  # what is in use there may be files, which give way
        files |= {"sys/fs/cgroup/memory.max": limit, "sys/fs/cgroup/memory.current": "900"}
    assert machine_host.obtainable_memory(tree(tmp_path, files)) == expected


def test_memory_of_an_unknown_system(tmp_path: Path) -> None:
    assert machine_host.obtainable_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "container"),
    [
        ({".dockerenv": ""}, "docker"),
        ({"run/.containerenv": ""}, "podman"),
        ({"var/run/secrets/kubernetes.io/token": ""}, "kubernetes"),
        ({"proc/1/cgroup": "0::/kubepods/pod1\n"}, "kubernetes"),
        ({"proc/1/cgroup": "4:memory:/docker/abc\n"}, "docker"),
        ({"proc/1/cgroup": "0::/init.scope\n"}, ""),
    ],
)
def test_containers_are_told_apart(files: dict[str, str], container: str, tmp_path: Path) -> None:
    assert machine_host.probe_host(tree(tmp_path, files)).container == container


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, (UNLIMITED, UNLIMITED)),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, (UNLIMITED, UNLIMITED)),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "100\n", "sys/fs/cgroup/memory.current": "30"},
            (100, 70),
        ),
        (
            {  # the outer group leaves less than the inner one
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "100",
                "sys/fs/cgroup/a/b/memory.current": "30",
                "sys/fs/cgroup/a/memory.max": "200",
                "sys/fs/cgroup/a/memory.current": "190",
            },
            (200, 10),
        ),
        (
            {
                "proc/self/cgroup": "8:pids:/\n5:cpu,memory:/c\nnonsense\n",
                "sys/fs/cgroup/memory/c/memory.limit_in_bytes": "50",
                "sys/fs/cgroup/memory/c/memory.usage_in_bytes": "60",
            },
            (50, 0),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            (UNLIMITED, UNLIMITED),
        ),
    ],
)
def test_the_tightest_control_group_counts(files: dict[str, str], expected: tuple[int, int], tmp_path: Path) -> None:
    host = machine_host.probe_host(tree(tmp_path, files))
    assert (host.cgroup_limit_bytes, host.cgroup_free_bytes) == expected


def test_numa_nodes_and_the_node_of_a_gpu(tmp_path: Path) -> None:
    files = {
        "sys/devices/system/node/node10/cpulist": "4-5\n",
        "sys/devices/system/node/node2/cpulist": "0-1,3\n",
        "sys/devices/system/node/online": "0-1\n",
        "sys/bus/pci/devices/0000:18:00.0/numa_node": "10\n",
        "sys/bus/pci/devices/0000:19:00.0/numa_node": "-1\n",
    }
    tree(tmp_path, files)
    assert machine_host.probe_numa(tmp_path).nodes == (
        NumaNode(index=2, cpus=(0, 1, 3)),
        NumaNode(index=10, cpus=(4, 5)),
    )
    assert machine_host.numa_node_of("0000:18:00.0", tmp_path) == 10
    assert machine_host.numa_node_of("0000:19:00.0", tmp_path) is None
    assert machine_host.numa_node_of(None, tmp_path) is None


# ---- system calls and processes


def test_a_refused_system_call_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    monkeypatch.setattr("socket.send_fds", refuse, raising=False)
    monkeypatch.setattr(resource, "getrlimit", refuse)
    monkeypatch.setattr(machine_host, "run_limited", lambda *_: ("Operation not permitted\n", ""))
    host = machine_host.probe_host()
    assert host.memfd.ok is False and "Operation not permitted" in host.memfd.detail
    assert host.socket_descriptors.ok is False and "Operation not permitted" in host.socket_descriptors.detail
    assert host.pidfd_getfd == Check(ok=False, detail="Operation not permitted")
    assert host.locked_memory_bytes is None


def test_a_trial_that_cannot_run_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_host, "run_limited", lambda *_: (None, "did not end within 10 s"))
    assert machine_host.probe_pidfd_getfd() == Check(ok=None, detail="trying pidfd_getfd did not end within 10 s")


def test_the_child_of_the_trial_says_why_it_failed() -> None:
    """Without a descriptor of that number, the kernel's own word for it comes back."""
    command = [sys.executable, "-I", "-S", "-c", machine_host._TAKE_DESCRIPTOR, str(os.getpid()), "9999"]
    printed, _ = machine_host.run_limited(command, 10.0)
    assert printed is not None and printed.strip() not in ("", "taken")


def test_a_command_that_hangs_is_left_behind() -> None:
    start = time.monotonic()
    printed, problem = machine_host.run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.3)
    assert (printed, problem) == (None, "did not end within 0.3 s")
    assert time.monotonic() - start < 10


def test_a_command_that_fails_says_how() -> None:
    assert machine_host.run_limited(["/no/such/program"], 5)[0] is None
    printed, problem = machine_host.run_limited([sys.executable, "-c", "raise SystemExit('first\\nlast')"], 10)
    assert (printed, problem) == (None, "ended with code 1: last")
    assert machine_host.run_limited([sys.executable, "-c", "print('x')"], 10) == ("x\n", "")


# ---- GPUs


def test_the_driver_is_asked_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with a torch that only pretends to have CUDA: the process that is asked runs the real one."""
    if torch.version.cuda is not None:
        pytest.skip("shown by the real run where torch has CUDA")
    assert machine.probe_gpus_apart(MIB, 60) == Gpus(problem="this torch build has no CUDA support")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    calls = []
    monkeypatch.setattr(machine, "run_limited", lambda *args: calls.append(args) or machine_host.run_limited(*args))
    assert machine.probe_gpus_apart(MIB, 60) == Gpus(problem="this torch build has no CUDA support")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((None, "did not end within 60 s"), "unknown: asking the CUDA driver did not end within 60 s"),
        (("no JSON\n", ""), "unknown: the CUDA driver's answer cannot be parsed"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_fact(
    answer: tuple[str | None, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "run_limited", lambda *_: answer)
    assert machine.probe_gpus_apart(MIB, 60).problem.startswith(problem)


def test_the_answer_is_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Gpu(index=0, name="GPU", capability="9.0", memory_total_bytes=5, stream_memory_operations=Check(ok=True))
    gpus = Gpus(devices=(device,), peers=(Peer(source=0, target=1, access=None),), pinned_memory=Check(ok=False))
    printed = "a warning of a library\n" + msgspec.json.encode(gpus).decode() + "\n"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "run_limited", lambda *_: (printed, ""))
    assert machine.probe_gpus_apart(MIB, 60) == gpus


def test_every_gpu_is_described_though_single_questions_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("CUDA error: busy\nmore")

    properties = SimpleNamespace(name="GPU", major=9, minor=0, total_memory=7, pci_domain_id=0, pci_bus_id=0x18)
    properties.pci_device_id = 1
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda _: properties,
        "mem_get_info": fail,
        "can_device_access_peer": lambda source, _: True if source == 0 else fail(),
        "synchronize": fail,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(machine_cuda, "_attribute", lambda *_: None)
    monkeypatch.setitem(
        sys.modules, "antiphon.device.cuda_stream_memory", SimpleNamespace(check_stream_memory_operations=fail)
    )
    monkeypatch.setitem(sys.modules, "antiphon.kernels.fused.direct", SimpleNamespace(launch_obstacle=fail))
    gpus = machine_cuda.probe_gpus(MIB)
    assert [device.index for device in gpus.devices] == [0, 1]
    assert gpus.devices[0].pci == "0000:18:01.0" and gpus.devices[0].memory_free_bytes is None
    assert gpus.devices[0].stream_memory_operations == Check(ok=False, detail="CUDA error: busy")
    assert {(peer.source, peer.target): peer.access for peer in gpus.peers} == {(0, 1): True, (1, 0): None}
    assert gpus.pinned_memory == Check(ok=False, detail="CUDA error: busy")
    assert gpus.direct_launches == Check(ok=None, detail="Triton cannot be asked: CUDA error: busy")
    direct = SimpleNamespace(launch_obstacle=lambda: "the launcher is not known")
    monkeypatch.setitem(sys.modules, "antiphon.kernels.fused.direct", direct)
    assert machine_cuda.probe_gpus(MIB).direct_launches == Check(ok=False, detail="the launcher is not known")
    direct.launch_obstacle = lambda: ""
    assert machine_cuda.probe_gpus(MIB).direct_launches == Check(ok=True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert machine_cuda.probe_gpus(MIB) == Gpus(problem="the CUDA driver failed: CUDA error: busy")


@pytest.mark.parametrize(
    ("limit", "trial"), [(None, 16), (UNLIMITED, 16), (8 * MIB, 16), (64 * MIB, 128), (1 << 40, 256)]
)
def test_the_trial_exceeds_a_small_limit_on_locked_memory(limit: int | None, trial: int) -> None:
    assert machine._trial_bytes(limit) == trial * MIB


# ---- this machine


def test_this_machine() -> None:
    facts = machine.examine_machine()
    assert facts.versions.torch == torch.__version__
    assert ("gloo" in facts.versions.backends) == torch.distributed.is_gloo_available()
    assert not {"undefined", "fake"} & set(facts.versions.backends)  # torch lists them, and they move nothing
    assert len(facts.gpus.devices) == (torch.cuda.device_count() if torch.version.cuda else 0)
    assert bool(facts.gpus.devices) != bool(facts.gpus.problem)
    if sys.platform == "linux":
        assert facts.host.memory_total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert set(facts.numa.affinity) == os.sched_getaffinity(0)
        assert facts.host.memfd.ok is True and facts.host.socket_descriptors.ok is True
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert facts.host.locked_memory_bytes == (UNLIMITED if soft == resource.RLIM_INFINITY else soft)
    assert msgspec.json.decode(msgspec.json.encode(facts), type=type(facts)) == facts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_of_this_machine_answer() -> None:
    gpus = machine.examine_machine().gpus
    assert gpus.problem == ""
    for device in gpus.devices:
        assert device.stream_memory_operations.ok is True, device.stream_memory_operations.detail
        assert device.memory_free_bytes is not None and device.memory_free_bytes <= device.memory_total_bytes
        assert device.pci is not None
    assert gpus.pinned_memory.ok is True, gpus.pinned_memory.detail
    assert gpus.direct_launches.ok is True, gpus.direct_launches.detail
    for peer in gpus.peers:
        assert peer.access == torch.cuda.can_device_access_peer(peer.source, peer.target)


def test_the_calling_process_gets_no_context() -> None:
    code = (
        "import torch\nfrom antiphon.machine.probe import examine_machine\n"
        "examine_machine()\nassert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_gpus_are_found_on_the_bus_whatever_torch_can_do_with_them(tmp_path: Path) -> None:
    found = {
        "0000:18:00.0": ("0x10de", "0x030200"),  # a GPU without a display
        "0000:3b:00.0": ("0x10de", "0x030000"),  # one with a display
        "0000:3b:00.1": ("0x10de", "0x040300"),  # its sound
        "0000:05:00.0": ("0x10de", "0x068000"),  # an NVSwitch
        "0000:00:02.0": ("0x8086", "0x030000"),  # somebody else's
    }
    for name, (vendor, kind) in found.items():
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    (tmp_path / "sys/bus/pci/devices/0000:06:00.0").mkdir()  # nobody may read it
    assert machine.nvidia_gpus(tmp_path) == 2
    assert machine.nvidia_gpus(tmp_path / "nothing") == 0
