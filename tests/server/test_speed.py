"""The server compared with `LLM.generate`: the same 64 prompts at once, in turns, while /health is probed.

The numbers are printed as one JSON object (`pytest -s`).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from tests.support.processes import worker_pids
from tests.support.prompts import mixed_prompts
from tests.support.server import ServerProcess
from tests.support.streams import events, get, whole

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(900)]

NUM_REQUESTS = 64
NUM_TOKENS = 96
NUM_REPEATS = 5
PARAMS: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0.0}


async def ask_all(port: int, prompts: list[str], health_s: list[float], *, stream: bool) -> None:
    async def probe() -> None:
        while True:
            start_s = time.monotonic()
            await get(port, "/health")
            health_s.append(time.monotonic() - start_s)
            await asyncio.sleep(0.1)  # probes take time from the ranks, too

    async def ask(prompt: str) -> None:
        content = {"prompt": prompt, **PARAMS}
        if stream:
            assert [True async for _ in events(port, "/v1/completions", content)]
        else:
            answer = await whole(port, "/v1/completions", content)
            assert answer["usage"]["completion_tokens"] == NUM_TOKENS

    probing = asyncio.create_task(probe())
    try:
        await asyncio.gather(*map(ask, prompts))
    finally:
        probing.cancel()
        with suppress(asyncio.CancelledError):
            await probing


def cpu_s(frontend: int) -> float:
    """CPU time so far of a frontend process and its ranks, without other programs of the machine."""
    ticks = 0
    for pid in (frontend, *worker_pids(frontend)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_the_server_is_nearly_as_fast_as_generate() -> None:
    prompts = mixed_prompts(NUM_REQUESTS * (NUM_REPEATS + 1))
    seconds: dict[str, list[float]] = {"generate": [], "whole": [], "stream": []}
    health_s: dict[str, list[float]] = {"whole": [], "stream": []}
    words = ["--ranks", "2", "--dbo", "on", "--no-prefix-caching"]
    used_s: dict[str, list[float]] = {"generate": [], "whole": [], "stream": []}
    with LLM(ranks=2, dbo="on", prefix_caching=False) as llm, ServerProcess(*words) as server:
        port = int(server.url.rpartition(":")[2])
        for repeat in range(NUM_REPEATS + 1):
            batch = prompts[NUM_REQUESTS * repeat : NUM_REQUESTS * (repeat + 1)]
            for arm in ("generate", "whole", "stream"):
                frontend = os.getpid() if arm == "generate" else server.process.pid
                start_s, start_cpu_s = time.monotonic(), cpu_s(frontend)
                if arm == "generate":
                    llm.generate(batch, SamplingParams(**PARAMS))
                else:
                    asyncio.run(ask_all(port, batch, health_s[arm], stream=arm == "stream"))
                if repeat:  # the first repeat warms up
                    seconds[arm].append(time.monotonic() - start_s)
                    used_s[arm].append(cpu_s(frontend) - start_cpu_s)
    medians = {arm: statistics.median(taken) for arm, taken in seconds.items()}
    num_tokens = NUM_REQUESTS * NUM_TOKENS
    ratios = {arm: [a / b for a, b in zip(seconds["generate"], seconds[arm], strict=True)] for arm in health_s}
    result = {
        "tokens_per_s": {arm: round(num_tokens / taken_s) for arm, taken_s in medians.items()},
        "of_generate": {arm: round(statistics.median(of_pairs), 3) for arm, of_pairs in ratios.items()},
        "health_p99_ms": {arm: round(1e3 * statistics.quantiles(s, n=100)[98], 1) for arm, s in health_s.items()},
        "cpu_s": {arm: round(statistics.median(used), 2) for arm, used in used_s.items()},
        "seconds": {arm: [round(taken_s, 2) for taken_s in taken] for arm, taken in seconds.items()},
    }
    print(json.dumps(result))
    assert result["of_generate"]["whole"] >= 0.9
    assert result["of_generate"]["stream"] >= 0.75
    assert result["health_p99_ms"]["whole"] < 50
