"""The sampler: greedy and drawn tokens, limits by count and probability, and logits as bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from antiphon.core.batch import Batch, RequestSlice
from antiphon.core.sampling import SamplingParams
from antiphon.engine.request import Request
from antiphon.engine.sampler import Sampler, choose_token

HIDDEN, VOCAB = 6, 20

HEAD_VD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


def to_logits(hidden_ND: torch.Tensor) -> torch.Tensor:
    """Row by row, so that a row does not depend on how many others there are."""
    return (hidden_ND.unsqueeze(1) * HEAD_VD).sum(-1)


def make_request(number: int = 0, *, prompt_len: int = 3, seed: int = 0, **params: Any) -> Request:
    return Request(
        request_id=number,
        prompt_ids=tuple(range(prompt_len)),
        params=SamplingParams(**params),
        max_tokens=10,
        seed=seed,
    )


def make_batch(requests: Sequence[Request], query_lens: Sequence[int]) -> Batch:
    slices = [
        RequestSlice(request_id=request.request_id, token_ids=(1,) * length, context_len=0, block_ids=(1,))
        for request, length in zip(requests, query_lens, strict=True)
    ]
    return Batch(rank=0, requests=tuple(slices))


def make_hidden(num_tokens: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def make_sampler(requests: Sequence[Request]) -> Sampler:
    return Sampler(to_logits, {request.request_id: request for request in requests})


def draw(logits: Sequence[float], count: int, *, seed: int = 3, **params: Any) -> Counter[int]:
    """How often each token is drawn by one request."""
    request = make_request(seed=seed, **({"temperature": 1.0} | params))
    logits_V = torch.tensor(logits)
    return Counter(choose_token(logits_V, request) for _ in range(count))


def assert_shares(counts: Counter[int], expected: dict[int, float]) -> None:
    """Within four standard deviations."""
    total = counts.total()
    assert set(counts) <= set(expected)
    for token, share in expected.items():
        deviation = math.sqrt(total * share * (1 - share))
        assert abs(counts[token] - total * share) <= 4 * deviation + 1e-9, (token, counts)


# ---- which hidden state decides


def test_greedy_takes_the_best_token_after_the_last_of_each_request() -> None:
    requests = [make_request(number) for number in (4, 9, 2)]
    hidden_TD = make_hidden(6)
    sampled = make_sampler(requests)(hidden_TD, make_batch(requests, [3, 1, 2]))
    assert sampled.token_ids == to_logits(hidden_TD[[2, 3, 5]]).argmax(-1).tolist()
    assert (sampled.logits, sampled.prompt_logits) == ({}, {})


def test_an_empty_batch() -> None:
    sampled = make_sampler([])(torch.empty(0, HIDDEN), make_batch([], []))
    assert sampled.token_ids == []


def test_greedy_and_drawn_requests_in_one_batch() -> None:
    requests = [make_request(0), make_request(1, temperature=1.0, top_k=1), make_request(2)]
    hidden_TD = make_hidden(3)
    sampled = make_sampler(requests)(hidden_TD, make_batch(requests, [1, 1, 1]))
    assert sampled.token_ids == to_logits(hidden_TD).argmax(-1).tolist()


# ---- seeds


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits_V = torch.zeros(1000)
    first, again, other = (
        [choose_token(logits_V, request) for _ in range(20)]
        for request in [make_request(seed=seed, temperature=1.0) for seed in (5, 5, 6)]
    )
    assert first == again
    assert first != other
    assert len(set(first)) > 10


def test_draws_do_not_depend_on_what_else_is_in_the_batch() -> None:
    """Alone; second of three, of which another one draws too and ends early; with the global generator disturbed."""
    hidden_TD = make_hidden(10)

    def tokens_alone() -> list[int]:
        request = make_request(7, seed=11, temperature=1.5)
        sampler = make_sampler([request])
        return [sampler(hidden_TD[i : i + 1], make_batch([request], [1])).token_ids[0] for i in range(10)]

    def tokens_among_others() -> list[int]:
        request = make_request(7, seed=11, temperature=1.5)
        others = [make_request(1, seed=11, temperature=0.7), make_request(3)]
        sampler = make_sampler([request, *others])
        tokens = []
        for i in range(10):
            batch = [others[0], request, others[1]] if i < 6 else [others[1], request]
            rows = torch.cat([make_hidden(1, seed=40 + i)] * len(batch))
            rows[1] = hidden_TD[i]
            torch.manual_seed(i)
            torch.rand(3)
            tokens.append(sampler(rows, make_batch(batch, [1] * len(batch))).token_ids[1])
        return tokens

    assert tokens_alone() == tokens_among_others()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_all_seeds_that_are_allowed_work(seed: int) -> None:
    assert choose_token(torch.zeros(4), make_request(seed=seed, temperature=1.0)) in range(4)


# ---- distribution

SHARES = [0.5, 0.25, 0.15, 0.1]
LOGITS = [math.log(share) for share in (0.15, 0.5, 0.1, 0.25)]  # tokens 1, 3, 0, 2 by likelihood
SHARE_OF = {1: 0.5, 3: 0.25, 0: 0.15, 2: 0.1}


@pytest.mark.parametrize("offset", [0.0, 500.0, -500.0])
def test_all_tokens_by_their_probability(offset: float) -> None:
    assert_shares(draw([logit + offset for logit in LOGITS], 3000), SHARE_OF)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature: float) -> None:
    powers = {token: share ** (1 / temperature) for token, share in SHARE_OF.items()}
    total = sum(powers.values())
    assert_shares(draw(LOGITS, 3000, temperature=temperature), {token: p / total for token, p in powers.items()})


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 0]), (4, [1, 3, 0, 2]), (99, [1, 3, 0, 2])]
)
def test_top_k(top_k: int, kept: list[int]) -> None:
    total = sum(SHARE_OF[token] for token in kept)
    assert_shares(draw(LOGITS, 2000, top_k=top_k), {token: SHARE_OF[token] / total for token in kept})


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.74, [1, 3]),
        (0.76, [1, 3, 0]),
        (0.91, [1, 3, 0, 2]),
        (1.0, [1, 3, 0, 2]),
    ],
)
def test_top_p(top_p: float, kept: list[int]) -> None:
    total = sum(SHARE_OF[token] for token in kept)
    assert_shares(draw(LOGITS, 2000, top_p=top_p), {token: SHARE_OF[token] / total for token in kept})


def test_top_p_counts_within_top_k() -> None:
    """Of tokens 1 and 3 alone, the first has two thirds of the probability."""
    assert set(draw(LOGITS, 300, top_k=2, top_p=0.6)) == {1}
    assert set(draw(LOGITS, 300, top_k=2, top_p=0.7)) == {1, 3}


def test_top_k_of_equal_tokens_keeps_exactly_so_many() -> None:
    assert len(draw([0.0] * 10, 300, top_k=3)) == 3


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """`SamplingParams` allows it, and an error inside a step would end the engine for everybody."""
    assert set(draw([1.0, 30.0, -40.0], 20, temperature=temperature)) == {1}


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 100.0])
def test_logits_of_minus_infinity_are_never_drawn(temperature: float) -> None:
    assert set(draw([-math.inf, 1.0, -math.inf], 20, temperature=temperature)) == {1}


# ---- logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_come_as_bytes(dtype: torch.dtype) -> None:
    requests = [
        make_request(0, return_logits=True),
        make_request(1),
        make_request(2, return_logits=True, return_prompt_logits=True),
    ]
    hidden_TD = make_hidden(6).to(dtype)
    sampled = make_sampler(requests)(hidden_TD, make_batch(requests, [1, 2, 3]))
    assert set(sampled.logits) == {0, 2}
    assert set(sampled.prompt_logits) == {2}
    for place, row in ((0, 0), (2, 5)):
        logits_V = torch.frombuffer(bytearray(sampled.logits[place]), dtype=dtype)
        assert torch.equal(logits_V, to_logits(hidden_TD[row : row + 1])[0])
        assert int(logits_V.argmax()) == sampled.token_ids[place]
    prompt_SV = torch.frombuffer(bytearray(sampled.prompt_logits[2]), dtype=dtype).view(3, VOCAB)
    assert torch.equal(prompt_SV, to_logits(hidden_TD[3:6]))


def test_prompt_logits_come_once() -> None:
    request = make_request(0, return_prompt_logits=True)
    sampler = make_sampler([request])
    assert set(sampler(make_hidden(3), make_batch([request], [3])).prompt_logits) == {0}
    request.output_ids.append(5)
    assert sampler(make_hidden(1), make_batch([request], [1])).prompt_logits == {}


def test_logits_are_those_before_temperature_and_limits() -> None:
    request = make_request(0, temperature=0.5, top_k=2, return_logits=True)
    hidden_TD = make_hidden(1)
    sampled = make_sampler([request])(hidden_TD, make_batch([request], [1]))
    assert torch.equal(torch.frombuffer(bytearray(sampled.logits[0]), dtype=torch.float32), to_logits(hidden_TD)[0])
