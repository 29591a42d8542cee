"""A step launched before the tokens of the one before are known: the same texts as one step at a time."""

from __future__ import annotations

from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from antiphon.comm import RankGroup
from tests.engine.traffic import Traffic, of_engines
from tests.support.ranks import run_ranks

TRAFFIC = Traffic(seed=3, num_requests=18, vocab_size=300)
AHEAD: dict[str, Any] = {"device": "generic:cpu"}
SIZES = "1,2,4,8,12"
BLOCK_BYTES = 30_720  # of 16 tokens of the bundled model, in float32


def alike(texts: dict[int, list[int]], others: dict[int, list[int]]) -> None:
    """Every text that was not aborted is the same; of the others, the shorter one is a beginning."""
    assert texts.keys() == others.keys()
    for number, text in texts.items():
        common = min(len(text), len(others[number]))
        assert text[:common] == others[number][:common], number
        assert number % 2 == 0 or len(text) == len(others[number]), number


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    arms = [
        {"device": "cpu"},
        AHEAD,
        AHEAD | {"cuda_graph_sizes": SIZES},
        AHEAD | {"cuda_graph_sizes": SIZES, "dbo": "on"},
        AHEAD | {"cuda_graph_sizes": "1,2", "async_scheduling": False},
        AHEAD | {"cuda_graph_sizes": SIZES, "kv_cache_memory": 6 * BLOCK_BYTES},
    ]
    return of_engines(RankGroup(rank=0, size=1), TRAFFIC, arms)


def test_texts_are_those_of_one_step_at_a_time(found: list[dict[str, Any]]) -> None:
    first, *others = found
    for other in others:
        alike(first["tokens"], other["tokens"])


def test_what_was_padded_and_why_the_rest_was_not(found: list[dict[str, Any]]) -> None:
    stats = [one["stats"] for one in found]
    assert [one["graphs"]["padded"] > 0 for one in stats] == [False, False, True, True, True, True]
    assert all(one["graphs"]["replayed"] == 0 for one in stats), "nothing here can be captured"
    for one in stats:
        assert sum(one["graphs"]["eager_reasons"].values()) == one["steps"]
        assert one["graphs"]["eager_reasons"]["it has prompt tokens"]
    assert stats[4]["graphs"]["eager_reasons"]["more sequences than the largest size"]


def test_steps_that_had_to_wait_are_counted(found: list[dict[str, Any]]) -> None:
    at_once, ahead, *_ = (one["stats"]["synchronous_reasons"] for one in found)
    assert at_once == {}, "on a CPU no step is launched ahead"
    assert ahead.keys() == {"logprobs", "penalties"}
    assert found[4]["stats"]["synchronous_reasons"] == {}
    assert found[5]["stats"]["preemptions"], "the cache was to be too small for all"


@pytest.mark.processes
def test_two_ranks_with_different_traffic() -> None:
    arms = [AHEAD | {"cuda_graph_sizes": SIZES, "dbo": dbo} for dbo in ("off", "on")]
    arms.append({"device": "cpu"})
    for off, on, cpu in run_ranks("tests.engine.traffic:of_engines", 2, TRAFFIC, arms):
        alike(off["tokens"], on["tokens"])
        alike(off["tokens"], cpu["tokens"])
        assert on["stats"]["steps_by_plan"]["dual"] and off["stats"]["graphs"]["padded"]


def test_an_interrupt_between_two_steps_loses_no_token() -> None:
    """A front end that stops polling and goes on later finds every token."""
    llm = LLM(**AHEAD, max_model_len=64)
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    whole = llm.generate(["abc"], params)[0].outputs[0].token_ids
    assert len(whole) == 9
    engine = llm._client._engine  # type: ignore[union-attr, attr-defined]
    real, calls = engine.sampler.launch, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    engine.sampler.launch = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc"], params)
    engine.sampler.launch = real
    assert llm.generate(["abc"], params)[0].outputs[0].token_ids == whole
    llm.close()
