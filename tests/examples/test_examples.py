"""Every example runs and shows what it claims."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.examples.network import NoNamespacesError, two_hosts

ROOT = Path(__file__).parents[2]
TESTED = {"offline_overlap.py", "own_moe.py", "serve_and_ask.py"}  # own_moe.py in tests/docs too, on one host


def torchrun_of(line: str) -> list[str]:
    """Turn a line of the documentation into a command for this Python."""
    program, *words = line.partition("#")[0].split()
    assert program == "torchrun"
    return [sys.executable, "-m", "torch.distributed.run", *words]


def start(command: list[str], output: Path, **settings: str) -> subprocess.Popen[bytes]:
    """Start a command in its own session, so that all its processes can be killed."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **settings}
    with output.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for_all(processes: list[subprocess.Popen[bytes]], limit_s: float) -> list[int | None]:
    """Return the exit codes, `None` for one that did not end in time. All processes are killed afterwards."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return codes


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == TESTED


@pytest.mark.slow  # test_engine_overlap shows the same by the trial of `antiphon demo`
@pytest.mark.processes
def test_offline_overlap_hides_communication(tmp_path: Path) -> None:
    ended = start([sys.executable, "examples/offline_overlap.py"], tmp_path / "printed")
    codes = wait_for_all([ended], 100)
    printed = (tmp_path / "printed").read_text()
    assert codes == [0], printed
    hidden = {dbo: int(share) for dbo, share in re.findall(r"^dbo (\w+) *: .*\((\d+)%\) were hidden", printed, re.M)}
    assert hidden.keys() == {"off", "on"}
    assert hidden["on"] > hidden["off"] + 15
    assert printed.splitlines()[-1] == "the tokens are equal"


@pytest.mark.processes
def test_the_library_example_runs_over_two_hosts(tmp_path: Path) -> None:
    text = (ROOT / "docs/library.md").read_text()
    interface = re.findall(r"^export GLOO_SOCKET_IFNAME=(\w+)", text, re.M)[0]
    lines = [line for line in text.splitlines() if line.startswith("torchrun ") and "--node-rank" in line]
    (address,) = set(re.findall(r"--master-addr (\S+)", "\n".join(lines)))
    assert len(lines) == 2
    outputs = [tmp_path / "printed-0", tmp_path / "printed-1"]
    with ExitStack() as stack:
        try:
            both = (address, address.rpartition(".")[0] + ".200")
            hosts = stack.enter_context(two_hosts(both, interface))
        except NoNamespacesError as error:
            pytest.skip(f"two network namespaces cannot be made here: {error}")
        before = [host.bytes_sent() for host in hosts]
        processes = [
            start(host.command(torchrun_of(line)), output, GLOO_SOCKET_IFNAME=interface)
            for host, line, output in zip(hosts, lines, outputs, strict=True)
        ]
        codes = wait_for_all(processes, 80)
        sent = [host.bytes_sent() - earlier for host, earlier in zip(hosts, before, strict=True)]
    printed = [output.read_text(errors="replace") for output in outputs]
    assert codes == [0, 0], "\n".join(printed)
    for rank in range(2):
        assert f"rank {rank} on cpu over alltoall: two lanes give what one lane gives" in printed[rank]
    # A token has 64 float32 and goes to the other host with a probability of about 3/4: 256 of them, twice, both ways.
    assert min(sent) > 2 * 256 * 64 * 4 * 0.5


@pytest.mark.slow  # test_server_documents runs that of the README
@pytest.mark.processes
def test_a_server_answers_the_openai_client(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="openai is not installed: pip install openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ended = start([sys.executable, "examples/serve_and_ask.py", port], tmp_path / "printed")
    codes = wait_for_all([ended], 100)
    printed = (tmp_path / "printed").read_text(errors="replace")
    assert codes == [0], printed
    assert "How many apples does Ben have?\nAnswer: " in printed and "#### 12" in printed
    assert "Ruby" in printed.partition("#### 12")[2]


def test_the_library_example_without_torchrun_names_the_command() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    ended = subprocess.run(
        [sys.executable, "examples/own_moe.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    (said,) = ended.stderr.splitlines()
    assert "torchrun --nproc-per-node 2 examples/own_moe.py" in said


def test_the_library_example_imports_from_two_faces_only() -> None:
    tree = ast.parse((ROOT / "examples/own_moe.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {name for name in modules if name.startswith("antiphon")} == {"antiphon.runtime", "antiphon.comm"}
