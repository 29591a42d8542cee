"""The server against `LLM.generate`: the same prompts, 64 at once, by turns; and /health meanwhile.

The numbers are printed as one JSON object (`pytest -s`).
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from contextlib import suppress
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
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
            await asyncio.sleep(0.02)

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


def test_the_server_is_nearly_as_fast_as_generate() -> None:
    prompts = mixed_prompts(NUM_REQUESTS * (NUM_REPEATS + 1))
    seconds: dict[str, list[float]] = {"generate": [], "whole": [], "stream": []}
    health_s: dict[str, list[float]] = {"whole": [], "stream": []}
    words = ["--ranks", "2", "--dbo", "on", "--no-prefix-caching"]
    with LLM(ranks=2, dbo="on", prefix_caching=False) as llm, ServerProcess(*words) as server:
        port = int(server.url.rpartition(":")[2])
        for repeat in range(NUM_REPEATS + 1):
            batch = prompts[NUM_REQUESTS * repeat : NUM_REQUESTS * (repeat + 1)]
            times = {}
            start_s = time.monotonic()
            llm.generate(batch, SamplingParams(**PARAMS))
            times["generate"] = time.monotonic() - start_s
            for arm in ("whole", "stream"):
                start_s = time.monotonic()
                asyncio.run(ask_all(port, batch, health_s[arm], stream=arm == "stream"))
                times[arm] = time.monotonic() - start_s
            if repeat:  # the first one warms up
                for arm, taken_s in times.items():
                    seconds[arm].append(taken_s)
    medians = {arm: statistics.median(taken) for arm, taken in seconds.items()}
    num_tokens = NUM_REQUESTS * NUM_TOKENS
    result = {
        "tokens_per_s": {arm: round(num_tokens / taken_s) for arm, taken_s in medians.items()},
        "of_generate": {arm: round(medians["generate"] / medians[arm], 3) for arm in ("whole", "stream")},
        "health_p99_ms": {arm: round(1e3 * statistics.quantiles(s, n=100)[98], 1) for arm, s in health_s.items()},
        "seconds": {arm: [round(taken_s, 2) for taken_s in taken] for arm, taken in seconds.items()},
    }
    print(json.dumps(result))
    assert result["of_generate"]["whole"] >= 0.9
    assert result["health_p99_ms"]["whole"] < 50
