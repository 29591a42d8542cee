"""Many streams for minutes, some of them cancelled: every answer right, memory flat, every block free at the end.

`ANTIPHON_SOAK_S` is the duration; the default is 300 s. The numbers are printed as one JSON object (`pytest -s`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from tests.support.processes import worker_pids
from tests.support.prompts import mixed_prompts
from tests.support.server import ServerProcess
from tests.support.streams import events, get, whole

SECONDS = float(os.environ.get("ANTIPHON_SOAK_S", "300"))
NUM_CLIENTS = 64
NUM_CASES = 96
MOST_GROWTH_MB = 48

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(SECONDS + 400)]


def case(number: int) -> dict[str, Any]:
    params: dict[str, Any] = {"max_tokens": 4 + 7 * number % 60, "seed": number}
    params["temperature"] = 1.0 if number % 3 == 0 else 0.0
    if number % 5 == 0:
        params["n"] = 2
    if number % 4 == 0:
        params["stop"] = ["the", "."]
    return params


def memory_mb(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        total += (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    return total / 2**20


class Soak:
    def __init__(self, server: ServerProcess, prompts: list[str], expected: list[list[str]]) -> None:
        self.port = int(server.url.rpartition(":")[2])
        self.prompts, self.expected = prompts, expected
        self.pids = [server.process.pid, *worker_pids(server.process.pid)]
        self.until_s = time.monotonic() + SECONDS
        self.counts = {"finished": 0, "whole": 0, "cancelled": 0, "disconnected": 0}
        self.memory_mb: list[float] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_CLIENTS):
                group.create_task(self.client(random.Random(number)))
            group.create_task(self.watch())

    async def client(self, draw: random.Random) -> None:
        while time.monotonic() < self.until_s:
            number = draw.randrange(NUM_CASES)
            content = {"prompt": self.prompts[number], **case(number)}
            kind = draw.random()
            if kind < 0.2:
                answer = await whole(self.port, "/v1/completions", content)
                assert [choice["text"] for choice in answer["choices"]] == self.expected[number]
                self.counts["whole"] += 1
            elif kind < 0.3:
                asking = asyncio.create_task(whole(self.port, "/v1/completions", content))
                await asyncio.wait([asking], timeout=draw.random())
                asking.cancel()
                await asyncio.wait([asking])
                self.counts["disconnected"] += 1
            else:
                await self.stream(number, content, draw.randrange(1, 12) if kind < 0.55 else None)

    async def stream(self, number: int, content: dict[str, Any], most_events: int | None) -> None:
        texts = [""] * case(number).get("n", 1)
        num_events = 0
        async with aclosing(events(self.port, "/v1/completions", content)) as stream:
            async for event in stream:
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["text"]
                num_events += 1
                if num_events == most_events:
                    break
        if num_events == most_events:
            assert all(full.startswith(text) for full, text in zip(self.expected[number], texts, strict=True)), texts
            self.counts["cancelled"] += 1
        else:
            assert texts == self.expected[number]
            self.counts["finished"] += 1

    async def watch(self) -> None:
        while time.monotonic() < self.until_s:
            for path in ("/health", "/metrics"):
                status, _ = await get(self.port, path)
                assert status == 200
            self.memory_mb.append(memory_mb(self.pids))
            await asyncio.sleep(0.5)


def test_many_streams_for_minutes(two_ranks: LLM) -> None:
    prompts = mixed_prompts(NUM_CASES)
    two_ranks.reconfigure(dbo="on")
    outputs = two_ranks.generate(prompts, [SamplingParams(**case(number)) for number in range(NUM_CASES)])
    expected = [[result.text for result in output.outputs] for output in outputs]
    with ServerProcess("--ranks", "2", "--dbo", "on") as server:
        soak = Soak(server, prompts, expected)
        asyncio.run(soak.run())
        deadline = time.monotonic() + 5
        while server.metric("antiphon:num_requests_open") or server.metric("antiphon:kv_cache_usage_perc"):
            assert time.monotonic() < deadline, "something is left open"
            time.sleep(0.05)
        quarter = len(soak.memory_mb) // 4
        early, late = soak.memory_mb[quarter : 2 * quarter], soak.memory_mb[-quarter:]
        growth_mb = statistics.median(late) - statistics.median(early)
        result = {
            "seconds": SECONDS,
            **soak.counts,
            "memory_mb": [round(mb) for mb in soak.memory_mb[:: max(1, len(soak.memory_mb) // 10)]],
            "growth_mb": round(growth_mb, 1),
            "dual_steps": server.metric("antiphon:steps_total", plan="dual"),
        }
        print(json.dumps(result))
        assert min(soak.counts.values()) > 0 and result["dual_steps"] > 0
        assert growth_mb < MOST_GROWTH_MB
        assert server.end() == 0
