"""The sampler: which slices get a token, seeds, and the logits and logprobs that requests ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from antiphon.core.batch import Batch, RequestSlice
from antiphon.engine.sampling.sampler import Sampler
from antiphon.engine.scheduling.request import NewToken, PromptPart, Request
from tests.support.sampling import choose, make_batch, make_request

HIDDEN, VOCAB = 6, 20

HEAD_VD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


def to_logits(hidden_ND: torch.Tensor) -> torch.Tensor:
    """Compute logits row by row, so that a row does not depend on the number of others."""
    return (hidden_ND.unsqueeze(1) * HEAD_VD).sum(-1)


def make_hidden(num_tokens: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def make_sampler(requests: Sequence[Request], **options: Any) -> Sampler:
    table = {request.request_id: request for request in requests}
    return Sampler(to_logits, table, vocab_size=VOCAB, eos_token_ids=(2,), **options)


def ids_of(tokens: Sequence[NewToken]) -> list[int]:
    return [token.token_id for token in tokens]


# ---- which hidden state decides


def test_greedy_takes_the_best_token_after_the_last_of_each_request() -> None:
    requests = [make_request(number) for number in (4, 9, 2)]
    hidden_TD = make_hidden(6)
    sampled = make_sampler(requests)(hidden_TD, make_batch(requests, [3, 1, 2]))
    assert ids_of(list(sampled.tokens.values())) == to_logits(hidden_TD[[2, 3, 5]]).argmax(-1).tolist()
    assert sampled.prompt == {}


def test_an_empty_batch() -> None:
    sampled = make_sampler([])(torch.empty(0, HIDDEN), make_batch([], []))
    assert (sampled.tokens, sampled.prompt) == ({}, {})


def slice_of(request: Request, start: int, stop: int) -> RequestSlice:
    return RequestSlice(
        request_id=request.request_id, token_ids=(1,) * (stop - start), context_len=start, block_ids=(1,)
    )


def test_a_slice_that_ends_before_the_text_gets_no_token() -> None:
    """A chunk of a prompt; a decode; a prompt and its output computed again in two chunks."""
    requests = [make_request(0, prompt_ids=range(9)), make_request(1), make_request(2, output_ids=[5, 6])]
    requests[1].output_ids.append(7)
    hidden_TD = make_hidden(9)
    parts = (slice_of(requests[0], 2, 6), slice_of(requests[1], 3, 4), slice_of(requests[2], 0, 4))
    sampled = make_sampler(requests)(hidden_TD, Batch(rank=0, requests=parts))
    assert list(sampled.tokens) == [1]
    assert sampled.tokens[1].token_id == int(to_logits(hidden_TD[4:5]).argmax())
    parts = (slice_of(requests[0], 6, 9), slice_of(requests[2], 4, 5))
    sampled = make_sampler(requests)(hidden_TD[:4], Batch(rank=0, requests=parts))
    assert ids_of(list(sampled.tokens.values())) == to_logits(hidden_TD[2:4]).argmax(-1).tolist()


def test_only_chunks_of_prompts() -> None:
    request = make_request(0, prompt_ids=range(9))
    sampled = make_sampler([request])(make_hidden(4), Batch(rank=0, requests=(slice_of(request, 0, 4),)))
    assert sampled.tokens == {}


def test_greedy_and_drawn_requests_in_one_batch() -> None:
    requests = [make_request(0), make_request(1, temperature=1.0, top_k=1), make_request(2)]
    hidden_TD = make_hidden(3)
    sampled = make_sampler(requests)(hidden_TD, make_batch(requests, [1, 1, 1]))
    assert ids_of(list(sampled.tokens.values())) == to_logits(hidden_TD).argmax(-1).tolist()


# ---- seeds


def draws(seed: int, count: int) -> list[int]:
    request = make_request(seed=seed, temperature=1.0)
    for _ in range(count):
        request.output_ids.append(choose(torch.zeros(1, 1000), [request])[0].token_id)
    return request.output_ids


def test_the_same_seed_draws_the_same_tokens() -> None:
    assert draws(5, 20) == draws(5, 20)
    assert draws(5, 20) != draws(6, 20)
    assert len(set(draws(5, 20))) > 10


MIXED: list[dict[str, Any]] = [
    {"temperature": 1.5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 7, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.4, "min_tokens": 4},
    {"temperature": 2.0, "logit_bias": {3: 4.0}, "logprobs": 2},
]


@pytest.mark.parametrize("params", MIXED, ids=str)
def test_draws_do_not_depend_on_what_else_is_in_the_batch(params: dict[str, Any]) -> None:
    """Alone, and as one of four requests, of which one ends early, with torch's own generator disturbed."""
    hidden_TD = make_hidden(10)

    def alone() -> list[int]:
        request = make_request(7, seed=11, **params)
        sampler = make_sampler([request])
        for i in range(10):
            request.output_ids.append(sampler(hidden_TD[i : i + 1], make_batch([request])).tokens[0].token_id)
        return request.output_ids

    def among_others() -> list[int]:
        request = make_request(7, seed=11, **params)
        others = [make_request(1, seed=11, **MIXED[0]), make_request(3, **MIXED[2]), make_request(4, **MIXED[1])]
        sampler = make_sampler([request, *others], most_elements=2 * VOCAB)
        for i in range(10):
            batch = [others[0], request, others[1], others[2]] if i < 6 else [others[1], request]
            rows_ND = torch.cat([make_hidden(1, seed=40 + i)] * len(batch))
            rows_ND[1] = hidden_TD[i]
            torch.manual_seed(i)
            torch.rand(3)
            sampled = sampler(rows_ND, make_batch(batch))
            for place, one in enumerate(batch):
                one.output_ids.append(sampled.tokens[place].token_id)
        return request.output_ids

    assert alone() == among_others()


@pytest.mark.parametrize("params", MIXED, ids=str)
def test_a_request_that_is_computed_again_continues_unchanged(params: dict[str, Any]) -> None:
    """After a preemption, prompt and output come as one prefill, to a sampler without any state of the request."""
    hidden_TD = make_hidden(8)

    def run(preempt_at: int) -> list[int]:
        request = make_request(seed=3, **params)
        sampler = make_sampler([request])
        for i in range(8):
            hidden_ND, query_len = hidden_TD[i : i + 1], 1
            if i == preempt_at:
                request.sampling, sampler = None, make_sampler([request])
                query_len = request.num_tokens
                hidden_ND = torch.cat([make_hidden(query_len - 1, seed=9), hidden_ND])
            batch = make_batch([request], [query_len])
            request.output_ids.append(sampler(hidden_ND, batch).tokens[0].token_id)
        return request.output_ids

    assert run(5) == run(-1)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_all_seeds_that_are_allowed_work(seed: int) -> None:
    assert choose(torch.zeros(1, 4), [make_request(seed=seed, temperature=1.0)])[0].token_id in range(4)


# ---- logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_come_as_bytes(dtype: torch.dtype) -> None:
    requests = [
        make_request(0, return_logits=True),
        make_request(1),
        make_request(2, return_logits=True, return_prompt_logits=True),
    ]
    for request in requests[:2]:
        request.output_ids.append(4)
    hidden_TD = make_hidden(5).to(dtype)
    sampled = make_sampler(requests, most_elements=2 * VOCAB)(hidden_TD, make_batch(requests, [1, 1, 3]))
    assert [place for place, token in sampled.tokens.items() if token.logits is not None] == [0, 2]
    assert set(sampled.prompt) == {2}
    for place, row in ((0, 0), (2, 4)):
        logits_V = torch.frombuffer(bytearray(sampled.tokens[place].logits or b""), dtype=dtype)
        assert torch.equal(logits_V, to_logits(hidden_TD[row : row + 1])[0])
        assert int(logits_V.argmax()) == sampled.tokens[place].token_id
    prompt_SV = torch.frombuffer(bytearray(sampled.prompt[2].logits or b""), dtype=dtype).view(3, VOCAB)
    assert torch.equal(prompt_SV, to_logits(hidden_TD[2:5]))


def test_logits_and_logprobs_are_those_before_anything_changes_them() -> None:
    request = make_request(temperature=0.5, top_k=2, logit_bias={13: 50.0}, return_logits=True, logprobs=3)
    hidden_TD = make_hidden(1)
    token = make_sampler([request])(hidden_TD, make_batch([request])).tokens[0]
    logits_V = to_logits(hidden_TD)[0]
    assert torch.equal(torch.frombuffer(bytearray(token.logits or b""), dtype=torch.float32), logits_V)
    logprobs_V = logits_V.log_softmax(-1)
    assert (token.token_id, token.logprob) == (13, pytest.approx(float(logprobs_V[13]), abs=1e-6))
    assert token.rank == 1 + int((logprobs_V > logprobs_V[13]).sum()) > 1
    top_K, ids_K = logprobs_V.topk(3)
    assert [token_id for token_id, _ in token.top] == ids_K.tolist()
    assert [logprob for _, logprob in token.top] == pytest.approx(top_K.tolist(), abs=1e-6)


def test_each_request_gets_as_many_logprobs_as_it_wants() -> None:
    requests = [make_request(0, logprobs=5), make_request(1), make_request(2, logprobs=0), make_request(3, logprobs=20)]
    for most_elements in (1, 2**20):
        tokens = make_sampler(requests, most_elements=most_elements)(make_hidden(4), make_batch(requests)).tokens
        assert [len(token.top) for token in tokens.values()] == [5, 0, 0, 20]
        assert [token.logprob is None for token in tokens.values()] == [False, True, False, False]
        assert tokens[0].top[0] == (tokens[0].token_id, tokens[0].logprob) and tokens[0].rank == 1


def test_equal_tokens_have_one_rank_and_the_lower_id_first() -> None:
    requests = [make_request(0, logprobs=2, logit_bias={7: 1.0}), make_request(1, logprobs=2)]
    first, second = choose(torch.zeros(2, 10), requests)
    assert (first.token_id, first.rank, [token_id for token_id, _ in first.top]) == (7, 1, [0, 1])
    assert (second.token_id, second.rank, [token_id for token_id, _ in second.top]) == (0, 1, [0, 1])


# ---- prompts in chunks


def prompt_parts(cuts: Sequence[tuple[int, int]], **options: Any) -> list[PromptPart | None]:
    """One request computed in these slices."""
    request = make_request(prompt_ids=range(5, 12), return_prompt_logits=True, prompt_logprobs=2)
    hidden_TD = make_hidden(9)
    sampler = make_sampler([request], **options)
    parts = []
    for start, stop in cuts:
        batch = Batch(rank=0, requests=(slice_of(request, start, stop),))
        parts.append(sampler(hidden_TD[start:stop], batch).prompt.get(0))
        if stop == request.num_tokens:
            request.output_ids.append(3)
    return parts


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 7)],
        [(0, 7), (7, 8), (8, 9)],
        [(0, 1), (1, 5), (5, 6), (6, 7), (7, 8)],
        [(0, 3), (0, 2), (2, 6), (6, 7)],
        [(0, 7), (0, 8), (8, 9)],
        [(0, 7), (0, 5), (5, 8)],
        [(0, 6), (0, 4), (4, 7), (7, 8), (0, 9)],
    ],
    ids=str,
)
@pytest.mark.parametrize("most_elements", [1, 2 * VOCAB, 2**20])
def test_every_position_of_a_prompt_is_reported_once(cuts: list[tuple[int, int]], most_elements: int) -> None:
    """In one piece, in chunks, computed again in the middle of the prompt or later."""
    parts = [part for part in prompt_parts(cuts, most_elements=most_elements) if part is not None]
    logits_SV = torch.frombuffer(bytearray(b"".join(part.logits or b"" for part in parts)), dtype=torch.float32)
    expected_SV = to_logits(make_hidden(9)[:7])
    assert torch.equal(logits_SV.view(-1, VOCAB), expected_SV)
    told = [token for part in parts for token in part.logprobs]
    assert ids_of(told) == list(range(6, 12))
    for token, logprobs_V in zip(told, expected_SV.log_softmax(-1), strict=False):
        assert token.logprob == pytest.approx(float(logprobs_V[token.token_id]), abs=1e-6)
        assert token.rank == 1 + int((logprobs_V > logprobs_V[token.token_id]).sum())
        assert [token_id for token_id, _ in token.top] == logprobs_V.topk(2).indices.tolist()


def test_a_position_that_was_never_computed_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"\b0\b.*\b2\b"):
        prompt_parts([(2, 7)])


def test_logits_of_a_prompt_alone_and_logprobs_alone() -> None:
    requests = [make_request(0, return_prompt_logits=True), make_request(1, prompt_logprobs=0), make_request(2)]
    sampled = make_sampler(requests)(make_hidden(9), make_batch(requests, [3, 3, 3]))
    assert set(sampled.prompt) == {0, 1}
    assert sampled.prompt[0].logprobs == [] and len(sampled.prompt[0].logits or b"") == 3 * VOCAB * 4
    assert sampled.prompt[1].logits is None
    assert [token.top for token in sampled.prompt[1].logprobs] == [(), ()]
