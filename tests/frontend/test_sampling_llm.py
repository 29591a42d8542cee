"""Sampling through `LLM`: every parameter does what it says, on one rank and on two, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from antiphon import LLM, CompletionOutput, GeneratedOutput, Logprob, RequestError, SamplingParams
from antiphon.config.engine_config import EngineConfig
from antiphon.frontend.prompts import RequestMaker, child_seed
from antiphon.frontend.tokenizer import NoTokenizer
from tests.support.errors import raises
from tests.support.prompts import mixed_prompts
from tests.support.reference import reference_logits

PROMPT = "Once upon a time there was a"


def one(llm: LLM, prompt: str = PROMPT, **params: Any) -> CompletionOutput:
    return llm.generate(prompt, SamplingParams(**params))[0].outputs[0]


# ---- logprobs


def assert_logprobs_of_transformers(outputs: list[GeneratedOutput], top: int) -> None:
    """Compare with transformers, within 1e-4: the model's own logprobs, although the tokens were drawn."""
    for output in outputs:
        num_prompt = len(output.prompt_token_ids)
        logprobs_SV = reference_logits((*output.prompt_token_ids, *output.token_ids)).log_softmax(-1)
        prompt_logprobs, logprobs = output.prompt_logprobs, output.outputs[0].logprobs
        assert prompt_logprobs is not None and logprobs is not None
        assert (len(prompt_logprobs), len(logprobs), prompt_logprobs[0]) == (num_prompt, len(output.token_ids), None)
        text = (*output.prompt_token_ids, *output.token_ids)
        told = [found for found in (*prompt_logprobs, *logprobs) if found is not None]
        for place, found in enumerate(told):
            expected_V = logprobs_SV[place]
            assert next(iter(found)) == text[place + 1]
            assert top <= len(found) <= top + 1
            for token_id, item in found.items():
                assert item.logprob == pytest.approx(float(expected_V[token_id]), abs=1e-4)
            by_rank = sorted(found.values(), key=lambda item: item.rank or 0)
            assert [item.rank for item in by_rank[:top]] == list(range(1, top + 1))
            likeliest = [item.logprob for item in by_rank[:top]]
            assert likeliest == pytest.approx(expected_V.topk(top).values.tolist(), abs=1e-4)
        chosen = [found[token_id].logprob for token_id, found in zip(output.token_ids, logprobs, strict=True)]
        assert output.outputs[0].cumulative_logprob == pytest.approx(sum(chosen))


LOGPROBS = SamplingParams(max_tokens=12, logprobs=3, prompt_logprobs=3, temperature=0.8, seed=5, ignore_eos=True)


def test_logprobs_are_those_of_transformers(one_rank: LLM) -> None:
    assert_logprobs_of_transformers(one_rank.generate(mixed_prompts(8), LOGPROBS), 3)


@pytest.mark.processes
def test_logprobs_of_prompts_in_chunks(two_ranks: LLM) -> None:
    """A few tokens per step. Some prompts begin alike, but none is taken from the prefix cache unreported."""
    prompts = [*mixed_prompts(4), *(f"{PROMPT} {animal}" for animal in ("dog", "hen")), PROMPT]
    with LLM(max_num_batched_tokens=11, block_size=4, max_num_seqs=4) as llm:
        outputs = llm.generate(prompts, LOGPROBS)
        again = llm.generate(prompts, SamplingParams(max_tokens=1))
        assert llm.stats()["steps"] > len(prompts) * 4
    assert_logprobs_of_transformers(outputs, 3)
    assert [output.num_cached_tokens for output in outputs] == [0] * len(prompts)
    assert min(output.num_cached_tokens for output in again) >= 4
    whole = two_ranks.generate(prompts, LOGPROBS)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in whole]
    assert_logprobs_of_transformers(whole, 3)


def test_decoded_tokens_are_texts_of_tokens(one_rank: LLM) -> None:
    completion = one(one_rank, logprobs=1, max_tokens=8, ignore_eos=True)
    assert completion.logprobs is not None
    texts = [
        found[token_id].decoded_token for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    assert "".join(texts) == completion.text
    assert isinstance(completion.logprobs[0][completion.token_ids[0]], Logprob)


# ---- seeds


@pytest.mark.processes
def test_a_seed_gives_one_text_alone_in_a_batch_and_on_two_ranks(one_rank: LLM, two_ranks: LLM) -> None:
    others = [
        SamplingParams(max_tokens=5 + 3 * i, temperature=0.5 + i / 4, seed=None if i % 2 else i) for i in range(9)
    ]
    prompts = mixed_prompts(10)
    alone = one(one_rank, temperature=1.0, seed=7, max_tokens=24, ignore_eos=True).token_ids
    assert len(set(alone)) > 8
    drawn = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)
    for llm in (one_rank, two_ranks):
        for place in (0, 4, 9):
            texts = [*prompts[:place], PROMPT, *prompts[place:-1]]
            params = [*others[:place], drawn, *others[place:]]
            assert llm.generate(texts, params)[place].token_ids == alone
    assert one(one_rank, temperature=1.0, seed=8, max_tokens=24, ignore_eos=True).token_ids != alone


def test_requests_without_a_seed_draw_differently_and_the_same_in_every_new_engine() -> None:
    texts = []
    for seed in (3, 3, 4):
        with LLM(seed=seed) as llm:
            params = SamplingParams(temperature=1.0, max_tokens=8)
            texts.append([output.token_ids for output in llm.generate([PROMPT] * 3, params)])
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(ids) for ids in texts[0]}) == 3


def test_preempted_requests_draw_and_count_as_if_alone(one_rank: LLM) -> None:
    prompts = [f"{PROMPT} {animal}" for animal in ("dog", "cat", "hen", "fox", "bear", "bird")]
    params = SamplingParams(
        max_tokens=30, temperature=1.0, presence_penalty=0.5, repetition_penalty=1.2, seed=3, ignore_eos=True
    )
    alone = [one_rank.generate(prompt, params)[0].token_ids for prompt in prompts]
    block_bytes = 6 * 4 * (64 + 16) * 4
    with LLM(kv_cache_memory=20 * block_bytes, block_size=4, max_model_len=64) as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == alone
        assert llm.stats()["preemptions"] > 0


# ---- n


@pytest.mark.processes
def test_n_results_of_one_prompt(one_rank: LLM, two_ranks: LLM) -> None:
    def params(n: int) -> SamplingParams:
        return SamplingParams(n=n, temperature=1.0, seed=5, max_tokens=10, prompt_logprobs=1, return_prompt_logits=True)

    (single,) = one_rank.generate(PROMPT, params(1))
    for llm in (one_rank, two_ranks):
        first, second = llm.generate([PROMPT, "The ship"], params(4))
        for output in (first, second):
            assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
            assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
            assert (output.text, output.token_ids) == (output.outputs[0].text, output.outputs[0].token_ids)
        assert first.outputs[0].token_ids == single.token_ids
        assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == len(first.prompt_token_ids)
        assert first.prompt_logits is not None and len(first.prompt_logits) == len(first.prompt_token_ids)
        ids = [
            llm.generate(PROMPT, SamplingParams(temperature=1.0, seed=child_seed(5, k), max_tokens=10)) for k in (1, 3)
        ]
        assert [first.outputs[k].token_ids for k in (1, 3)] == [output.token_ids for (output,) in ids]


def test_progress_counts_prompts_and_not_results(one_rank: LLM) -> None:
    seen: list[tuple[int, int, int]] = []
    params = [SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=m, ignore_eos=True) for m in (2, 5)]
    one_rank.generate([PROMPT, PROMPT], params, progress=lambda *numbers: seen.append(numbers))
    assert seen[0][:2] == (0, 2) and seen[-1] == (2, 2, 3 * 2 + 3 * 5)
    assert (1, 2) in {numbers[:2] for numbers in seen}


def test_child_seeds_are_seeds_and_differ() -> None:
    seeds = {child_seed(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(128)}
    assert len(seeds) == 3 * 128 and max(seeds) < 2**63
    assert child_seed(9, 0) == 9


# ---- ends


def test_stop_strings_end_the_request_on_its_rank(one_rank: LLM) -> None:
    plain = one(one_rank, max_tokens=40, ignore_eos=True)
    stop = plain.text[20:24]
    cut = one(one_rank, max_tokens=40, ignore_eos=True, stop=["not in it", stop])
    assert (cut.text, cut.stop_reason, cut.finish_reason) == (plain.text[: plain.text.find(stop)], stop, "stop")
    assert cut.token_ids == plain.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 40
    kept = one(one_rank, max_tokens=40, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert (kept.text, kept.token_ids) == (cut.text + stop, cut.token_ids)


@pytest.mark.processes
def test_two_ranks_forget_what_stop_strings_have_ended(two_ranks: LLM) -> None:
    prompts = mixed_prompts(12)
    plain = two_ranks.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    stops = [output.text[10:13] for output in plain]
    params = [SamplingParams(max_tokens=3000, ignore_eos=True, stop=stop) for stop in stops]
    steps = two_ranks.stats()["steps"]
    for output, cut, stop in zip(plain, two_ranks.generate(prompts, params), stops, strict=True):
        assert (cut.text, cut.outputs[0].stop_reason) == (output.text[: output.text.find(stop)], stop)
    stats = two_ranks.stats()
    assert stats["unfinished"] == 0 and stats["steps"] - steps < 1500, "the ranks continued a finished request"
    again = two_ranks.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    assert [output.token_ids for output in again] == [output.token_ids for output in plain]


def test_stop_token_ids_end_of_sequence_and_min_tokens(one_rank: LLM) -> None:
    problem = mixed_prompts(2)[0]
    solved = one(one_rank, problem, max_tokens=100)
    assert (solved.finish_reason, solved.stop_reason, solved.token_ids[-1]) == ("stop", None, 2)
    num_tokens = len(solved.token_ids)
    later = one(one_rank, problem, max_tokens=100, min_tokens=num_tokens + 3)
    assert len(later.token_ids) > num_tokens + 3 and 2 not in later.token_ids[:-1]
    assert later.token_ids[: num_tokens - 1] == solved.token_ids[:-1]
    ignored = one(one_rank, problem, max_tokens=num_tokens + 5, ignore_eos=True)
    assert len(ignored.token_ids) == num_tokens + 5 and ignored.token_ids[:num_tokens] == solved.token_ids
    token = solved.token_ids[3]
    place = solved.token_ids.index(token)
    stopped = one(one_rank, problem, max_tokens=100, stop_token_ids=[token])
    assert (stopped.token_ids, stopped.stop_reason) == (solved.token_ids[: place + 1], token)
    assert solved.text.startswith(stopped.text) and len(stopped.text) < len(solved.text)
    hidden = one(one_rank, problem, max_tokens=100, stop_token_ids=[token], min_tokens=place + 1)
    assert hidden.token_ids[:place] == solved.token_ids[:place] and token not in hidden.token_ids[: place + 1]


def test_no_max_tokens_is_as_many_as_there_is_room_for() -> None:
    with LLM(max_model_len=40) as llm:
        output = llm.generate(PROMPT, SamplingParams(max_tokens=None, ignore_eos=True))[0]
        assert len(output.prompt_token_ids) + len(output.token_ids) == 40
        output = llm.generate(PROMPT, SamplingParams(max_tokens=500, min_tokens=500, ignore_eos=True))[0]
        assert len(output.prompt_token_ids) + len(output.token_ids) == 40


# ---- each parameter changes the text as it says


def test_biases_and_penalties_change_greedy_texts(one_rank: LLM) -> None:
    plain = one(one_rank, max_tokens=1).token_ids
    assert set(one(one_rank, max_tokens=5, ignore_eos=True, logit_bias={77: 100.0}).token_ids) == {77}
    assert plain != one(one_rank, max_tokens=1, logit_bias={plain[0]: -100.0}).token_ids

    def num_different(**params: Any) -> int:
        outputs = one_rank.generate(mixed_prompts(16), SamplingParams(max_tokens=24, ignore_eos=True, **params))
        return sum(len(set(output.token_ids)) for output in outputs)

    usual = num_different()
    for name, least, most in (
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
        ("repetition_penalty", 0.5, 2.0),
    ):
        assert num_different(**{name: least}) < usual < num_different(**{name: most}), name


def test_limits_of_the_draw(one_rank: LLM) -> None:
    greedy = one(one_rank, max_tokens=12, ignore_eos=True).token_ids
    base = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.5, "seed": 4}
    assert one(one_rank, **base).token_ids != greedy
    for limit in ({"top_k": 1}, {"top_p": 0.001}, {"min_p": 1.0}, {"temperature": 1e-5}):
        assert one(one_rank, **base | limit).token_ids == greedy, limit
    assert one(one_rank, **base | {"top_k": -1}).token_ids == one(one_rank, **base | {"top_k": 0}).token_ids


@pytest.mark.processes
def test_all_parameters_reach_the_other_ranks(one_rank: LLM, two_ranks: LLM) -> None:
    everything = SamplingParams(
        max_tokens=20, min_tokens=18, temperature=1.2, top_k=200, top_p=0.9, min_p=0.001, presence_penalty=0.1,
        frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={268: 1.5, 19: -2}, seed=9, stop=["zzz"],
        stop_token_ids=[19], include_stop_str_in_output=True, logprobs=2, prompt_logprobs=2, return_logits=True,
    )  # fmt: skip
    prompts = mixed_prompts(4)
    for here, there in zip(*(llm.generate(prompts, everything) for llm in (one_rank, two_ranks)), strict=True):
        assert (here.token_ids, here.text) == (there.token_ids, there.text)
        assert len(here.token_ids) >= 18
        assert there.logits is not None and here.logits is not None
        assert torch.allclose(here.logits, there.logits, atol=1e-3)
        assert there.prompt_logprobs is not None and len(there.prompt_logprobs) == len(there.prompt_token_ids)


# ---- what cannot be served


@pytest.mark.parametrize(
    ("params", "option", "token_id"),
    [({"logit_bias": {4096: 1.0}}, "logit_bias", 4096), ({"stop_token_ids": [5000]}, "stop_token_ids", 5000)],
)
def test_tokens_that_the_model_does_not_have(one_rank: LLM, params: dict[str, Any], option: str, token_id: int) -> None:
    with raises(RequestError, "prompt 1 ", option=option, value=token_id, remedy="4095"):
        one_rank.generate([PROMPT] * 2, [SamplingParams(), SamplingParams(**params)])
    assert one_rank.stats()["unfinished"] == 0


def test_logits_that_no_message_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """On several ranks; on one they need no message."""
    monkeypatch.setattr("antiphon.frontend.prompts._MOST_LOGITS_BYTES", 10 * 4096 * 4)
    params = SamplingParams(return_prompt_logits=True)
    alone, one_of_two = (RequestMaker(EngineConfig(ranks=ranks).resolve(), NoTokenizer()) for ranks in (1, 2))
    assert alone.make([[5] * 11], [params]) and one_of_two.make([[5] * 10], [params])
    with raises(RequestError, "prompt 1 ", option="return_prompt_logits", remedy="max_num_batched_tokens"):
        one_of_two.make([[5], [5] * 11], [params] * 2)


def test_requests_that_are_refused_use_up_no_seed(one_rank: LLM) -> None:
    """What follows draws as if the wrong call had not been made."""
    make: Callable[..., Any] = one_rank._core._requests.make
    with pytest.raises(RequestError):
        make([[5], []], [SamplingParams(), SamplingParams()])
    first, second = make([[5], [6]], [SamplingParams(n=3), SamplingParams()])
    assert [request.request_id - first[0].request_id for request in (*first, *second)] == [0, 1, 2, 3]
    assert second[0].seed == first[0].seed + 1
