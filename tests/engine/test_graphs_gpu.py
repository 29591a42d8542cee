"""Captured steps on GPUs: the texts of eager steps, whatever comes and goes, and errors that say who is missing."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch

from antiphon import LLM, SamplingParams
from antiphon.comm import RankGroup
from antiphon.core.errors import EngineError
from tests.engine.test_running_ahead import alike
from tests.engine.traffic import Traffic, of_engines
from tests.support.errors import raises
from tests.support.processes import assert_no_new_workers, worker_pids
from tests.support.prompts import mixed_prompts
from tests.support.ranks import run_ranks

NUM_DEVICES = torch.cuda.device_count()
TRANSPORTS = ("one-sided", "copy-engine", "host-staged", "allgather")

one_gpu = [pytest.mark.gpu, pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")]
two_gpus = [pytest.mark.multigpu, pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices")]

pytestmark = pytest.mark.timeout(400)

OPTIONS: dict[str, Any] = {"device": "cuda", "dtype": "float32", "cuda_graph_sizes": "1,2,3,4,6,8,12,16"}


def check(eager: dict[str, Any], captured: dict[str, Any], *, least: int) -> None:
    alike(eager["tokens"], captured["tokens"])
    graphs = captured["stats"]["graphs"]
    assert graphs["replayed"] == graphs["padded"] >= least, graphs
    assert set(graphs["eager_reasons"]) <= {"it has prompt tokens"}
    assert eager["stats"]["graphs"]["replayed"] == 0


@pytest.mark.parametrize("small_cache", [False, True], ids=["", "preemptions"])
@pytest.mark.parametrize("how", [pytest.param("one rank", marks=one_gpu)])
def test_ten_thousand_replays_give_the_texts_of_eager_steps(how: str, small_cache: bool) -> None:
    memory = {"kv_cache_memory": 7 * 30_720} if small_cache else {"kv_cache_memory": 40_000_000}
    traffic = Traffic(seed=5, num_requests=200 if small_cache else 9000, vocab_size=3000, ends=3, most_open=14)
    arms = [OPTIONS | memory | {"enforce_eager": True, "cuda_graph_sizes": None}, OPTIONS | memory]
    eager, captured = of_engines(RankGroup(rank=0, size=1), traffic, arms)
    check(eager, captured, least=200 if small_cache else 10_000)
    assert bool(captured["stats"]["preemptions"]) == small_cache


@pytest.mark.parametrize("transport", [pytest.param(name, marks=two_gpus) for name in TRANSPORTS])
def test_two_ranks_with_different_traffic(transport: str) -> None:
    traffic = Traffic(seed=6, num_requests=300, vocab_size=3000, ends=3, most_open=14)
    options = OPTIONS | {"transport": transport, "kv_cache_memory": 40_000_000}
    arms = [options | {"enforce_eager": True, "cuda_graph_sizes": None}, options, options | {"dbo": "on"}]
    for eager, serial, dual in run_ranks("tests.engine.traffic:of_engines", 2, traffic, arms, limit_s=300):
        check(eager, serial, least=150)
        check(eager, dual, least=150)
        assert dual["stats"]["steps_by_plan"]["dual"] > 150


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=two_gpus) for kind in ("CopyEngine", "HostStaged", "OneSided")]
)
def test_a_peer_that_never_replays_is_named(kind: str) -> None:
    """Rank, layer, lane and phase, from a wait inside a replay."""
    before = worker_pids()
    transport = f"tests.support.transports:{kind}WithoutReplay"
    with (
        LLM(ranks=2, device="cuda", transport=transport, dbo="on", timeout_s=4) as llm,
        raises(EngineError, "rank 0 ", "dispatch layer ", "from rank 1", "rank 1 (pid ", ", running)") as raised,
    ):
        llm.generate(mixed_prompts(6), SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.0))
    assert re.search(r" [4-9]\.\d s .*dispatch layer \d, lane \d", str(raised.error))
    assert_no_new_workers(before)


@pytest.mark.parametrize("dbo", [pytest.param("on", marks=one_gpu)])
def test_two_engines_in_one_process_and_their_threads_take_turns(dbo: str) -> None:
    """Each has a compute stream of its own, which is current only while it works."""
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = mixed_prompts(3)
    options = {"device": "cuda", "dtype": "float32", "dbo": dbo, "kv_cache_memory": 40_000_000}
    default = torch.cuda.current_stream()
    with LLM(**options) as first, LLM(**options) as second:
        expected = [output.outputs[0].token_ids for output in first.generate(prompts, params)]
        found: list[list[tuple[int, ...]]] = []

        def generate(llm: LLM) -> None:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])

        for llm in (second, first, second):
            thread = threading.Thread(target=generate, args=(llm,))
            thread.start()
            thread.join(120)
            generate(llm)
        assert found == [expected] * 6
        assert first.stats()["graphs"]["replayed"] > 10
        assert torch.cuda.current_stream() == default


@pytest.mark.parametrize("dbo", [pytest.param("off", marks=one_gpu)])
def test_the_load_of_experts_is_counted_in_replays(dbo: str) -> None:
    """Every step whose number is a multiple of 64 counts all of its pairs, captured or not."""
    traffic = Traffic(seed=7, num_requests=4, vocab_size=3000, most_prompt=4, most_tokens=400, ends=0, sampled=False)
    found = []
    for more in ({}, {"enforce_eager": True, "cuda_graph_sizes": None}):
        options = OPTIONS | {"kv_cache_memory": 40_000_000, "max_model_len": 512} | more
        (one,) = of_engines(RankGroup(rank=0, size=1), traffic, [options])
        found.append(one["stats"])
    captured, eager = found
    assert captured["graphs"]["replayed"] > 128
    assert captured["expert_tokens"] == eager["expert_tokens"]
