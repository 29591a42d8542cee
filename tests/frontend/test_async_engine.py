"""The engine of a server: requests that come and go while others run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from antiphon.config.engine_config import EngineConfig
from antiphon.core.errors import EngineError, OptionError, RequestError
from antiphon.core.policy import OverlapPolicy
from antiphon.frontend.async_engine import AsyncEngine
from tests.support.errors import raises
from tests.support.processes import assert_no_new_workers, worker_pids
from tests.support.prompts import mixed_prompts

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def serve(work: Callable[[AsyncEngine], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run `work` in its own event loop, by default over two ranks with overlap on."""

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(**{"ranks": 2, "policy": OverlapPolicy(dbo="on")} | options))
        engine.attach()
        try:
            await work(engine)
        finally:
            await engine.close()

    before = worker_pids()
    asyncio.run(main())
    assert_no_new_workers(before)


async def texts_of(engine: AsyncEngine, prompt: str, params: SamplingParams) -> list[str]:
    pieces: dict[int, list[str]] = {}
    with engine.open(prompt, params) as request:
        async for item in request:
            pieces.setdefault(item.index, []).append(item.delta.text)
        assert ["".join(pieces[index]) for index in sorted(pieces)] == [
            collector.completion().text for collector in request.collectors
        ]
    return ["".join(pieces[index]) for index in sorted(pieces)]


def params_of(number: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=5 + number % 20,
        temperature=1.0 if number % 3 == 0 else 0.0,
        seed=number,
        n=2 if number % 5 == 0 else 1,
        stop=["the"] if number % 4 == 0 else None,
    )


def test_one_life_of_an_engine(two_ranks: LLM) -> None:
    prompts = mixed_prompts(24)
    two_ranks.reconfigure(dbo="on")
    outputs = two_ranks.generate(prompts, [params_of(number) for number in range(len(prompts))])
    expected = [[result.text for result in output.outputs] for output in outputs]

    async def work(engine: AsyncEngine) -> None:
        with raises(RequestError, "prompt 0 ", option="prompts", value=[]):
            engine.open([], SamplingParams())

        async def later(number: int) -> list[str]:
            await asyncio.sleep(0.01 * number)  # they join steps that run already
            return await texts_of(engine, prompts[number], params_of(number))

        answered, *texts = await asyncio.gather(engine.statistics(), *map(later, range(len(prompts))))
        assert texts == expected
        assert len(answered) == 2
        await _cancelled_requests_leave_nothing(engine)
        await _dbo_can_be_changed(engine)

    serve(work)


async def _cancelled_requests_leave_nothing(engine: AsyncEngine) -> None:
    long = SamplingParams(max_tokens=2000, ignore_eos=True)
    survivor = asyncio.create_task(
        texts_of(engine, "Once upon a time", SamplingParams(max_tokens=600, ignore_eos=True))
    )
    opened = [engine.open(prompt, long) for prompt in mixed_prompts(8)]
    async for item in opened[3]:
        if item.delta.token_ids:
            break
    running = await engine.statistics()
    assert sum(rank["unfinished"] for rank in running) == engine.num_open == 9
    for request in opened:
        request.cancel()
    assert engine.num_open == 1
    assert (await survivor)[0]
    after = await engine.statistics()
    assert [rank["unfinished"] for rank in after] == [0, 0]
    assert all(rank["kv_blocks"]["free"] == rank["kv_blocks"]["total"] for rank in after)


async def _dbo_can_be_changed(engine: AsyncEngine) -> None:
    for dbo, plan in (("off", "serial"), ("on", "dual")):
        async with asyncio.timeout(20):  # concurrent questions are all answered
            await asyncio.gather(engine.statistics(), engine.reconfigure(dbo=dbo), engine.statistics())
        before = (await engine.statistics())[0]["steps_by_plan"][plan]
        assert await texts_of(engine, mixed_prompts(2)[0], SamplingParams(max_tokens=4, n=4, ignore_eos=True))
        assert (await engine.statistics())[0]["steps_by_plan"][plan] > before
    long = SamplingParams(max_tokens=500, ignore_eos=True)
    with engine.open("Once", long), raises(OptionError, "1", option="dbo", value="off"):
        await engine.reconfigure(dbo="off")


def test_a_rank_that_dies_ends_every_stream_with_one_error() -> None:
    async def work(engine: AsyncEngine) -> None:
        told: list[EngineError] = []
        engine.on_failure = told.append
        long = SamplingParams(max_tokens=2000, ignore_eos=True)
        opened = [engine.open(prompt, long) for prompt in mixed_prompts(4)]
        victim = next(pid for pid, rank in worker_pids().items() if rank == 1 and pid not in before)

        async def read(place: int) -> None:
            async for _ in opened[place]:
                pass

        reading = [asyncio.create_task(read(place)) for place in range(4)]
        await asyncio.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
        asking = [asyncio.create_task(engine.statistics()) for _ in range(100)]
        results = await asyncio.wait_for(asyncio.gather(*reading, return_exceptions=True), 20)
        assert all(isinstance(result, EngineError) for result in results)
        answers = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 1)
        assert any(isinstance(answer, EngineError) for answer in answers)
        assert "rank 1" in str(results[0]) and "SIGKILL" in str(results[0])
        assert told == [engine.error]
        with raises(EngineError, "rank 1", "SIGKILL"):
            engine.open("Once", long)
        with raises(EngineError, "rank 1", "SIGKILL"):
            await engine.statistics()

    before = worker_pids()
    serve(work, timeout_s=10)


def test_requests_that_wait_at_a_busy_rank_are_all_answered() -> None:
    """More requests than ZeroMQ sockets queue by default, on both sides together."""

    async def work(engine: AsyncEngine) -> None:
        workers = [pid for pid in worker_pids() if pid not in before]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        opened = [engine.open([5, 6, 7], SamplingParams(max_tokens=1)) for _ in range(2500)]
        asking = asyncio.create_task(engine.statistics())
        await asyncio.sleep(0.5)  # so that they are sent while nobody reads
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(60):
            for request in opened:
                assert [item.delta.finish_reason async for item in request] == ["length"]
            await asking

    before = worker_pids()
    serve(work)


@pytest.mark.slow  # test_engine_worker has the sign alone
def test_a_long_prompt_is_no_silence() -> None:
    """Many steps without a token, for longer than a silent rank may take."""

    async def work(engine: AsyncEngine) -> None:
        start_s = time.monotonic()
        async with asyncio.timeout(60):
            with engine.open([5] * 1500, SamplingParams(max_tokens=1)) as request:
                assert [item.delta.finish_reason async for item in request] == ["length"]
        assert time.monotonic() - start_s > 1.5, "too fast to show it"

    serve(work, ranks=1, timeout_s=1.0, max_num_batched_tokens=8)


def test_a_rank_that_hangs_is_found_though_its_clients_have_gone() -> None:
    async def work(engine: AsyncEngine) -> None:
        (worker,) = [pid for pid in worker_pids() if pid not in before]
        os.kill(worker, signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while engine.error is None:
            assert time.monotonic() < deadline
            with engine.open("Once upon a time", SamplingParams(max_tokens=5)):
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.1)
        assert "no rank answered for 2 s" in str(engine.error) or "no rank answered for 1 s" in str(engine.error)

    before = worker_pids()
    serve(work, ranks=1, timeout_s=1.0)


def test_an_engine_that_never_served_is_closed() -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineConfig(ranks=1))
        await engine.close()
        with raises(EngineError, "closed"):
            engine.open("Once", SamplingParams())

    before = worker_pids()
    asyncio.run(main())
    assert_no_new_workers(before)
