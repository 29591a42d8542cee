"""The frontend accepts another launcher, whose ranks and frontend connect over TCP, as on several hosts."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from antiphon import LLM, SamplingParams
from antiphon.config.engine_config import EngineConfig
from antiphon.frontend.async_engine import AsyncEngine
from antiphon.launch import Launcher, RankProcesses


class TcpRanks(RankProcesses):
    def __init__(self, size: int, prefix: str) -> None:
        front, meeting = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        super().__init__(size=size, folder=Path(tempfile.mkdtemp(prefix=prefix)), front=front, meeting=meeting)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, module: str, environment: Mapping[str, str] | None = None, *, show_stderr_of_rank_0: bool = False
    ) -> None:
        merged = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
        for rank in range(self.size):
            command = [sys.executable, "-m", module, *self.place(rank).arguments()]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=merged))

    def exit_code(self, rank: int) -> int | None:
        return self.processes[rank].poll()

    def name(self, rank: int) -> str:
        return f"rank {rank} of the other launcher"

    def output(self, rank: int) -> str:
        return ""

    def end(self, *, patience_s: float = 0.0) -> None:
        for process in self.processes:
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()


class TcpLauncher(Launcher):
    def __init__(self) -> None:
        self.prepared: list[TcpRanks] = []

    def prepare(self, size: int, *, prefix: str = "antiphon-") -> TcpRanks:
        self.prepared.append(TcpRanks(size, prefix))
        return self.prepared[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.processes
def test_another_launcher_starts_the_ranks(two_ranks: LLM) -> None:
    launcher = TcpLauncher()
    params = SamplingParams(max_tokens=8, temperature=0)
    with LLM(ranks=2, transport="alltoall", debug_order=True, launcher=launcher) as llm:
        (ranks,) = launcher.prepared
        assert ranks.size == 2 and not ranks.any_ended()
        (result,) = llm.generate(["Once upon a time"], params)
    (expected,) = two_ranks.generate(["Once upon a time"], params)
    assert result.text == expected.text != ""
    assert [ranks.exit_code(rank) for rank in (0, 1)] == [0, 0]
    assert not ranks.folder.exists()


@pytest.mark.processes
def test_one_rank_of_another_launcher_is_a_process_too(one_rank: LLM) -> None:
    launcher = TcpLauncher()
    params = SamplingParams(max_tokens=8, temperature=0)
    with LLM(launcher=launcher) as llm:
        (result,) = llm.generate(["Once upon a time"], params)
    (expected,) = one_rank.generate(["Once upon a time"], params)
    assert result.text == expected.text != ""
    assert [ranks.exit_code(0) for ranks in launcher.prepared] == [0]


@pytest.mark.processes
def test_another_launcher_starts_the_ranks_of_an_async_engine() -> None:
    launcher = TcpLauncher()

    async def tokens_of_one_request() -> int:
        engine = AsyncEngine(EngineConfig(), launcher=launcher)
        engine.attach()
        try:
            with engine.open("Once upon a time", SamplingParams(max_tokens=4)) as request:
                async for _ in request:
                    pass
            return request.num_tokens
        finally:
            await engine.close()

    assert asyncio.run(tokens_of_one_request()) == 4
    assert [ranks.exit_code(0) for ranks in launcher.prepared] == [0]
