"""One `LLM` used by several threads, and what its progress function may call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from antiphon.core.errors import RequestError
from tests.support.errors import raises
from tests.support.prompts import mixed_prompts

pytestmark = [pytest.mark.processes, pytest.mark.timeout(200)]

PARAMS = SamplingParams(max_tokens=6, temperature=0.8, seed=3, ignore_eos=True)


@pytest.fixture(scope="module", params=[1, 2])
def llm(request: pytest.FixtureRequest) -> Any:
    with LLM(ranks=request.param, dbo="on", dtype="float32") as made:
        yield made


def test_threads_take_turns(llm: LLM) -> None:
    prompts = mixed_prompts(24)
    alone = [output.token_ids for output in llm.generate(prompts, PARAMS)]
    steps = llm.stats()["steps"]

    def generate(start: int) -> list[list[int]]:
        return [output.token_ids for output in llm.generate(prompts[start : start + 3], PARAMS)]

    def others(_: int) -> None:
        assert llm.stats()["steps"] >= steps
        llm.reconfigure(dbo="off")
        assert llm.timelines()
        llm.reconfigure(dbo="on")

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(others, number) for number in range(8)]
        found = [ids for some in pool.map(generate, range(0, 24, 3)) for ids in some]
        for one in asked:
            one.result()
    assert found == alone
    assert llm.stats()["unfinished"] == 0


def test_progress_may_ask_for_statistics_and_not_generate(llm: LLM) -> None:
    seen: list[int] = []

    def ask(*_: int) -> None:
        seen.append(llm.stats()["unfinished"])

    prompts = mixed_prompts(5)
    alone = [output.token_ids for output in llm.generate(prompts, PARAMS)]
    assert [output.token_ids for output in llm.generate(prompts, PARAMS, progress=ask)] == alone
    assert max(seen) >= 3 and seen[-1] == 0

    wrong: list[Callable[[], object]] = [lambda: llm.generate("a"), lambda: llm.generate(prompts, PARAMS)]
    for call in wrong:

        def nested(*_: int, call: Callable[[], object] = call) -> None:
            call()

        with raises(RequestError, "progress"):
            llm.generate(prompts, PARAMS, progress=nested)
        assert llm.stats()["unfinished"] == 0
        assert [output.token_ids for output in llm.generate(prompts, PARAMS)] == alone
