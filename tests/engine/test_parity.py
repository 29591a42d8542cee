"""The engine against transformers: logits and greedy tokens, for all ranks, transports and ways to split."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from antiphon import LLM, GeneratedOutput, SamplingParams
from antiphon.accuracy.evaluate import word_problems
from tests.support.prompts import mixed_prompts
from tests.support.reference import reference_greedy, reference_logits, relative_error

NUM_PROMPTS = 64
NUM_TOKENS = 64
NUM_WITH_LOGITS = 16
NUM_DECODES_CHECKED = 33  # the token that the prefill gives, and 32 decode steps

MODES = [("off", "token"), ("on", "token"), ("on", "request-boundary")]


def sampling() -> list[SamplingParams]:
    with_logits = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, return_logits=True, return_prompt_logits=True)
    without = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return [with_logits] * NUM_WITH_LOGITS + [without] * (NUM_PROMPTS - NUM_WITH_LOGITS)


def steps_of(llm: LLM, plan: str) -> int:
    return llm.stats()["steps_by_plan"].get(plan, 0)


def generate(llm: LLM, dbo: str, split: str) -> list[GeneratedOutput]:
    """Run all prompts and check that the steps were split if and only if they should be."""
    llm.reconfigure(dbo=dbo, split=split)
    duals, serials = steps_of(llm, "dual"), steps_of(llm, "serial")
    outputs = llm.generate(mixed_prompts(NUM_PROMPTS), sampling())
    duals, serials = steps_of(llm, "dual") - duals, steps_of(llm, "serial") - serials
    if dbo == "off":
        assert duals == 0 and serials >= NUM_TOKENS
    else:
        assert duals >= NUM_TOKENS and serials == 0
    return outputs


def assert_equals_transformers(outputs: list[GeneratedOutput]) -> None:
    for output in outputs:
        assert len(output.token_ids) == NUM_TOKENS
        assert output.token_ids == reference_greedy(output.prompt_token_ids, output.token_ids)
    for output in outputs[:NUM_WITH_LOGITS]:
        assert output.logits is not None and output.prompt_logits is not None
        expected = reference_logits((*output.prompt_token_ids, *output.token_ids))
        num_prompt = len(output.prompt_token_ids)
        assert relative_error(output.prompt_logits, expected[:num_prompt]) < 1e-4
        decoded = expected[num_prompt - 1 : num_prompt - 1 + NUM_DECODES_CHECKED]
        assert relative_error(output.logits[:NUM_DECODES_CHECKED], decoded) < 1e-4


@pytest.mark.parametrize(("dbo", "split"), MODES)
def test_one_rank_equals_transformers(one_rank: LLM, dbo: str, split: str) -> None:
    assert_equals_transformers(generate(one_rank, dbo, split))


@pytest.mark.processes
@pytest.mark.parametrize(("dbo", "split"), MODES)
def test_two_ranks_alltoall_equal_transformers(two_ranks: LLM, dbo: str, split: str) -> None:
    assert_equals_transformers(generate(two_ranks, dbo, split))


@pytest.mark.processes
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "transport", "modes"),
    [
        (2, "shared-memory", MODES[2:]),
        *(
            pytest.param(ranks, name, MODES, marks=pytest.mark.slow)
            for ranks in (2, 4)
            for name in ("alltoall", "allgather", "shared-memory")
            if (ranks, name) != (2, "alltoall")  # the test above
        ),
    ],
)
def test_more_ranks_and_transports_equal_transformers(ranks: int, transport: str, modes: list[tuple[str, str]]) -> None:
    with LLM(ranks=ranks, transport=transport) as llm:
        for dbo, split in modes:
            assert_equals_transformers(generate(llm, dbo, split))


@pytest.mark.processes
def test_all_word_problems_are_solved_on_two_ranks_with_overlap(two_ranks: LLM) -> None:
    two_ranks.reconfigure(dbo="on", split="token")
    duals = steps_of(two_ranks, "dual")
    problems = word_problems()
    outputs = two_ranks.generate([problem.prompt for problem in problems], SamplingParams(max_tokens=128))
    assert len(problems) == 256
    assert [o.text for p, o in zip(problems, outputs, strict=True) if not p.solved_by(o.text)] == []
    assert steps_of(two_ranks, "dual") > duals


@pytest.fixture(scope="module")
def float64_ranks() -> Iterator[LLM]:
    with LLM(ranks=2, transport="alltoall", dtype="float64") as llm:
        yield llm


@pytest.mark.processes
def test_split_and_unsplit_agree_in_float64(float64_ranks: LLM) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, return_logits=True, return_prompt_logits=True)
    outputs = {}
    for dbo, split in MODES:
        float64_ranks.reconfigure(dbo=dbo, split=split)
        outputs[dbo, split] = float64_ranks.generate(mixed_prompts(16), params)
    for mode in MODES[1:]:
        for serial, dual in zip(outputs["off", "token"], outputs[mode], strict=True):
            assert serial.token_ids == dual.token_ids
            for name in ("logits", "prompt_logits"):
                expected: torch.Tensor = getattr(serial, name)
                assert expected.dtype == torch.float64
                assert relative_error(getattr(dual, name), expected) < 1e-9


@pytest.mark.processes
def test_three_lanes_equal_one(two_ranks: LLM) -> None:
    prompts, params = mixed_prompts(16), SamplingParams(max_tokens=12, ignore_eos=True)
    two_ranks.reconfigure(dbo="off")
    expected = [output.token_ids for output in two_ranks.generate(prompts, params)]
    with LLM(ranks=2, dbo="on", micro_batches=3, transport="allgather") as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.stats()["steps_by_plan"] == {"serial": 0, "3-lane": 12}


def prompts_of(*sizes: int) -> list[list[int]]:
    """Make prompts of token ids. The first goes to rank 0, each other one to the least loaded rank."""
    numbers = random.Random(5)
    return [[numbers.randrange(300, 2000) for _ in range(size)] for size in sizes]


@pytest.mark.processes
def test_cut_between_requests_lanes_follow_all_ranks() -> None:
    """A prompt of 490 tokens and 16 prompts of 31: 490 + 248 in two lanes, where a serial step has 496."""
    one_token, four_tokens = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 4))
    options: dict[str, Any] = {"split": "request-boundary", "imbalance_ratio": 0.24, "debug_order": True}
    with LLM(ranks=2, dbo="on", prefix_caching=False, **options) as llm:
        llm.generate(prompts_of(490, *[31] * 16), one_token)
        stats = llm.stats()
        assert stats["steps_by_plan"] == {"serial": 1, "dual": 0}
        assert stats["serial_reasons"] == {"lanes are uneven across ranks": 1}
        assert stats["last_plan"] == (
            "serial: 738 tokens in lanes of 490 and 248, one after another, against 496 tokens on rank 1 in a serial "
            "step"
        )
        # 250 tokens that cannot be cut run in lane 1, like the 300 of the other rank; lane 0 of their rank is a dummy.
        prompts = prompts_of(250, 200, 300)
        dual = [output.token_ids for output in llm.generate(prompts, four_tokens)]
        assert llm.stats()["steps_by_plan"] == {"serial": 1, "dual": 4}
        llm.reconfigure(dbo="off")
        assert [output.token_ids for output in llm.generate(prompts, four_tokens)] == dual


@pytest.mark.slow
@pytest.mark.processes
def test_bfloat16_solves_the_word_problems() -> None:
    problems = word_problems()[:32]
    with LLM(ranks=2, dbo="on", dtype="bfloat16") as llm:
        outputs = llm.generate([problem.prompt for problem in problems], SamplingParams(max_tokens=128))
    assert all(problem.solved_by(output.text) for problem, output in zip(problems, outputs, strict=True))
