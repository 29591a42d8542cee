"""The engine on GPUs: the bundled model against transformers and the CPU, and the KV cache that is measured there.

Where these tests count dual steps, they see that the code under test ran, and no more: such small steps hide nothing.
What is hidden is measured in test_engine_overlap_gpu.py and in tests/bench/test_overlap_gpu.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from antiphon import LLM, GeneratedOutput, SamplingParams
from antiphon.accuracy.evaluate import word_problems
from antiphon.config.cache import block_bytes
from antiphon.core.batch import Batch, RequestSlice
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import EngineError, OptionError
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.sampling.sampler import Sampler
from antiphon.engine.scheduling.request import Request
from antiphon.models import read_config
from tests.support.errors import raises
from tests.support.processes import assert_no_new_workers, worker_pids
from tests.support.prompts import mixed_prompts
from tests.support.reference import reference_logits, relative_error

NUM_DEVICES = torch.cuda.device_count()

one_gpu = [pytest.mark.gpu, pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")]
two_gpus = [pytest.mark.multigpu, pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices")]

TRANSPORTS = ("allgather", "alltoall", "copy-engine", "one-sided", "host-staged")
RANKS = [
    pytest.param(1, "local", marks=one_gpu),
    *(pytest.param(2, transport, marks=two_gpus) for transport in TRANSPORTS),
]

NUM_PROMPTS = 32
NUM_TOKENS = 32
NEAR_TIE = 1e-4
"""Where the two best logits are closer, rounding may choose either."""

PARAMS = SamplingParams(
    max_tokens=NUM_TOKENS, ignore_eos=True, return_logits=True, return_prompt_logits=True, temperature=0.0
)


def steps_of(llm: LLM, plan: str) -> int:
    return steps_of_stats(llm.stats(), plan)


def steps_of_stats(stats: dict[str, Any], plan: str) -> int:
    return int(stats["steps_by_plan"].get(plan, 0))


def mismatches(output: GeneratedOutput) -> tuple[int, list[str]]:
    """Places where transformers would go on otherwise: how many are near ties, and the others in words."""
    num_ties, wrong = 0, []
    logits_SV = reference_logits((*output.prompt_token_ids, *output.token_ids))[len(output.prompt_token_ids) - 1 : -1]
    for place, (token, logits_V) in enumerate(zip(output.token_ids, logits_SV, strict=True)):
        if token != int(logits_V.argmax()):
            best, second = logits_V.topk(2).values.tolist()
            if best - second < NEAR_TIE:
                num_ties += 1
            else:
                wrong.append(
                    f"{output.prompt[:30]!r}, token {place}: {token}, and the best is ahead by {best - second}"
                )
    return num_ties, wrong


@pytest.mark.parametrize(("ranks", "transport"), RANKS)
@pytest.mark.timeout(600)
def test_float32_equals_transformers_with_overlap_on_and_off(ranks: int, transport: str) -> None:
    prompts, by_dbo = mixed_prompts(NUM_PROMPTS), {}
    with LLM(ranks=ranks, device="cuda", transport=transport, dtype="float32") as llm:
        assert "CPU" not in llm.stats()["device"]
        for dbo in ("off", "on"):
            llm.reconfigure(dbo=dbo)
            duals = steps_of(llm, "dual")
            by_dbo[dbo] = llm.generate(prompts, PARAMS)
            assert (steps_of(llm, "dual") - duals >= NUM_TOKENS) is (dbo == "on")
    num_ties = 0
    for outputs in by_dbo.values():
        for output in outputs:
            ties, wrong = mismatches(output)
            num_ties += ties
            assert wrong == []
            expected = reference_logits((*output.prompt_token_ids, *output.token_ids))
            assert output.prompt_logits is not None and output.logits is not None
            num_prompt = len(output.prompt_token_ids)
            assert relative_error(output.prompt_logits, expected[:num_prompt]) < 1e-4
            assert relative_error(output.logits, expected[num_prompt - 1 : -1]) < 1e-4
    print(f"near ties that went the other way: {num_ties} of {2 * NUM_PROMPTS * NUM_TOKENS} tokens")
    different = sum(a.token_ids != b.token_ids for a, b in zip(by_dbo["off"], by_dbo["on"], strict=True))
    assert different <= num_ties


@pytest.mark.parametrize(("ranks", "transport"), RANKS)
@pytest.mark.timeout(300)
def test_bfloat16_solves_all_word_problems(ranks: int, transport: str) -> None:
    problems = word_problems()
    with LLM(ranks=ranks, device="cuda", transport=transport) as llm:
        assert llm.config.dtype_name == "bfloat16"
        for dbo in ("off", "on"):
            llm.reconfigure(dbo=dbo)
            outputs = llm.generate(
                [problem.prompt for problem in problems], SamplingParams(max_tokens=128, temperature=0.0)
            )
            unsolved = [o.text for p, o in zip(problems, outputs, strict=True) if not p.solved_by(o.text)]
            assert unsolved == [], f"dbo {dbo}"
        assert steps_of(llm, "dual") > 0


@pytest.mark.parametrize(("ranks", "transport"), [RANKS[0], RANKS[3], RANKS[4]])
@pytest.mark.timeout(300)
def test_chunks_preemptions_and_hits_change_no_token(ranks: int, transport: str) -> None:
    """More requests than the KV cache holds, in steps that their prompts do not fit into."""
    prompts = mixed_prompts(NUM_PROMPTS) + mixed_prompts(NUM_PROMPTS)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0)
    with LLM(
        ranks=ranks,
        device="cuda",
        transport=transport,
        dtype="float32",
        dbo="on",
        block_size=4,
        max_num_batched_tokens=96,
        max_model_len=512,
        kv_cache_memory=160 * block_bytes(read_config(bundled_model()), block_size=4, dtype=torch.float32),
    ) as llm:
        outputs = llm.generate(prompts, params)
        stats = llm.stats()
    assert stats["preemptions"] > 0 and stats["prefix_cache"]["hit_tokens"] > 0
    assert stats["kv_blocks"]["free"] == stats["kv_blocks"]["total"]
    assert steps_of_stats(stats, "dual") > 0.5 * stats["steps"]
    for output in outputs:
        assert mismatches(output)[1] == []


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(device="cuda", dtype="float32") as llm:
        yield llm


@pytest.mark.gpu
@pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")
def test_drawn_and_greedy_requests_in_one_batch(llm: LLM) -> None:
    prompts = mixed_prompts(6)
    # A high temperature: the model is so sure of these texts that at 1.5 it still generates the greedy ones.
    drawn = SamplingParams(max_tokens=12, ignore_eos=True, temperature=3.0, top_p=0.95, seed=3)
    greedy = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
    first = llm.generate(prompts, [drawn, greedy] * 3)
    again = llm.generate(prompts, [drawn, greedy] * 3)
    alone = llm.generate(prompts[1::2], greedy)
    assert [output.token_ids for output in again] == [output.token_ids for output in first]
    assert [output.token_ids for output in alone] == [output.token_ids for output in first[1::2]]
    assert [o.token_ids for o in llm.generate(prompts[::2], greedy)] != [o.token_ids for o in first[::2]]


@pytest.mark.gpu
@pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")
@pytest.mark.parametrize("vocab_size", [61, 5000, 151_936])
def test_the_device_chooses_what_the_cpu_chooses(vocab_size: int) -> None:
    """The same float32 logits, requests of many kinds, several tokens each."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.0, "min_p": 0.1},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.4},
        {"temperature": 0.9, "repetition_penalty": 0.8, "logit_bias": {7: 5.0, 8: -100.0}, "min_tokens": 3},
        {"temperature": 1.0, "logprobs": 5},
    ]
    generator = torch.Generator().manual_seed(4)
    logits_SNV = torch.randn(5, 4 * len(kinds), vocab_size, generator=generator) * 4
    by_device = {}
    for device in ("cpu", "cuda"):
        requests = {
            number: Request(
                request_id=number,
                prompt_ids=(1, 2, 3 + number),
                params=ResolvedParams(max_tokens=9, **kinds[number % len(kinds)]),
                max_tokens=9,
                seed=number,
            )
            for number in range(4 * len(kinds))
        }
        sampler = Sampler(lambda logits: logits, requests, vocab_size=vocab_size, eos_token_ids=(2,))
        for logits_NV in logits_SNV:
            slices = [
                RequestSlice(request_id=n, token_ids=(5,), context_len=r.num_tokens - 1, block_ids=(1,))
                for n, r in requests.items()
            ]
            sampled = sampler(logits_NV.to(device), Batch(rank=0, requests=tuple(slices)))
            for number, request in requests.items():
                request.output_ids.append(sampled.tokens[number].token_id)
                logprob = sampled.tokens[number].logprob
                assert (logprob is None) is (request.params.logprobs is None)
        by_device[device] = [request.output_ids for request in requests.values()]
    assert by_device["cuda"] == by_device["cpu"]


# ---- memory


@pytest.mark.gpu
@pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")
def test_the_cache_takes_its_share_of_the_device_and_the_largest_step_still_fits() -> None:
    with LLM(device="cuda", gpu_memory_utilization=0.5) as llm:
        facts = llm.stats()["kv_cache"]
        assert facts["source"].startswith("50% of ")
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        free_bytes, _ = torch.cuda.mem_get_info(0)
        assert 0.4 < 1 - free_bytes / total_bytes < 0.55
        num_prompts = llm.config.max_num_batched_tokens // 64
        two_tokens = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0)
        outputs = llm.generate([[5 + n] * 64 for n in range(num_prompts)], two_tokens)
        assert len(outputs) == num_prompts
        free_after, _ = torch.cuda.mem_get_info(0)
        assert 1 - free_after / total_bytes < 0.55
    free_at_last, _ = torch.cuda.mem_get_info(0)
    assert free_at_last - free_after > 0.4 * total_bytes  # closing frees it, although this process continues


@pytest.mark.multigpu
@pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices")
def test_all_ranks_agree_on_the_cache_though_one_has_less_memory() -> None:
    taken = torch.empty(8 * 2**30, dtype=torch.uint8, device="cuda:1")
    with LLM(ranks=2, device="cuda") as llm:
        less = llm.config.kv_capacity_tokens
        blocks = llm.stats()["kv_blocks"]
        assert blocks["total"] == 2 * less // blocks["block_size"]
    del taken
    torch.cuda.empty_cache()
    with LLM(ranks=2, device="cuda") as llm:
        assert llm.config.kv_capacity_tokens > less


@pytest.mark.gpu
@pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")
def test_a_share_that_the_weights_fill_is_refused() -> None:
    with raises(OptionError, option="gpu_memory_utilization", value=1e-6, remedy="more ranks"):
        LLM(device="cuda", gpu_memory_utilization=1e-6)


# ---- failures


@pytest.mark.multigpu
@pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_peer_that_is_gone_is_named_within_the_time_limit(transport: str, how: signal.Signals) -> None:
    before = worker_pids()
    with LLM(ranks=2, device="cuda", transport=transport, dbo="on", timeout_s=5) as llm:
        llm.generate("Once", SamplingParams(max_tokens=2, temperature=0.0))
        victim = next(pid for pid, rank in worker_pids().items() if rank == 1 and pid not in before)
        hit_at: list[float] = []

        def hit(finished: int, total: int, tokens: int) -> None:
            if tokens > 20 and not hit_at:
                os.kill(victim, how)
                hit_at.append(time.monotonic())

        said = ("SIGKILL",) if how is signal.SIGKILL else ("rank 0 ", " s ")
        with raises(EngineError, *said, "rank 1"):
            llm.generate(
                mixed_prompts(4), SamplingParams(max_tokens=1500, ignore_eos=True, temperature=0.0), progress=hit
            )
        assert hit_at and time.monotonic() - hit_at[0] < 20
    assert_no_new_workers(before)
    with LLM(ranks=2, device="cuda", transport=transport) as llm:
        assert llm.generate("Once", SamplingParams(max_tokens=2, temperature=0.0))
