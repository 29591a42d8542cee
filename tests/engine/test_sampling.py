"""How tokens are drawn: against plain Python on small random logits, and by statistics on the bundled model's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from antiphon.engine.sampling.draw import draw_key, likeliest, random_bits, to_exponential
from antiphon.engine.scheduling.request import Request
from tests.support.reference import reference_logits
from tests.support.sampling import (
    EOS,
    choose,
    distribution,
    make_batch,
    make_request,
    make_sampler,
    reference_choice,
    split_mix_64,
)

VOCAB = 40

# ---- against plain Python

_EIGHTHS = st.integers(-64, 64).map(lambda number: number / 8)  # exact in float32, and often equal
_TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@st.composite
def requests_with_logits(draw: st.DrawFn) -> tuple[list[float], Request]:
    """Any mixture of parameters. Most of them are off, so that each is also tested alone."""

    def maybe(values: st.SearchStrategy[Any], otherwise: Any) -> Any:
        return draw(st.one_of(st.just(otherwise), values))

    request = make_request(
        prompt_ids=draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)),
        output_ids=draw(_TOKENS),
        seed=draw(st.integers(0, 2**63 - 1)),
        temperature=draw(st.sampled_from([0.0, 1e-30, 0.25, 1.0, 1.0, 2.0, 100.0])),
        top_k=maybe(st.integers(-1, VOCAB + 5), 0),
        top_p=maybe(st.floats(0.01, 0.99), 1.0),
        min_p=maybe(st.floats(0.001, 0.9), 0.0),
        repetition_penalty=maybe(st.sampled_from([0.5, 2.0, 4.0]), 1.0),
        frequency_penalty=maybe(st.sampled_from([-0.5, 0.25, 2.0]), 0.0),
        presence_penalty=maybe(st.sampled_from([-1.5, 0.125, 2.0]), 0.0),
        logit_bias=maybe(st.dictionaries(st.integers(0, VOCAB - 1), _EIGHTHS, max_size=4), None),
        min_tokens=maybe(st.integers(0, 12), 0),
        stop_token_ids=maybe(st.lists(st.integers(0, VOCAB - 1), max_size=3), None),
        ignore_eos=draw(st.booleans()),
    )
    return draw(st.lists(_EIGHTHS, min_size=VOCAB, max_size=VOCAB)), request


@settings(max_examples=150, deadline=None, database=None)
@given(
    cases=st.lists(requests_with_logits(), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    num_likeliest=st.sampled_from([2, 8, 1024]),
    most_elements=st.sampled_from([1, 3 * VOCAB, 2**20]),
)
def test_a_batch_equals_plain_python(
    cases: list[tuple[list[float], Request]], dtype: torch.dtype, num_likeliest: int, most_elements: int
) -> None:
    """Whatever the chunks, and however few tokens are sorted at first."""
    expected = []
    for number, (logits, request) in enumerate(cases):
        request.request_id = number
        token_id, margin = reference_choice(logits, request)
        assume(margin > 1e-9)
        expected.append(token_id)
    logits_NV = torch.tensor([logits for logits, _ in cases], dtype=dtype)
    requests = [request for _, request in cases]
    tokens = choose(logits_NV, requests, num_likeliest=num_likeliest, most_elements=most_elements)
    assert [token.token_id for token in tokens] == expected


@example(values=[[0.0, -0.0] * 16 + [0.0], [-0.0, 0.0] * 16 + [-1.0]], count=5)
@given(
    values=st.lists(st.lists(st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, 3.0]), min_size=33, max_size=33)),
    count=st.integers(0, 8),
)
@settings(deadline=None)
def test_the_likeliest_are_those_of_a_stable_sort(values: list[list[float]], count: int) -> None:
    values_NV = torch.tensor(values).view(-1, 33)
    top_NK, ids_NK = likeliest(values_NV, count)
    for row, top_K, ids_K in zip(values_NV.tolist(), top_NK.tolist(), ids_NK.tolist(), strict=True):
        assert ids_K == sorted(range(33), key=lambda i: (-row[i], i))[:count]
        assert top_K == [row[i] for i in ids_K]


# ---- statistics

NUM_DRAWS = 20_000
SHORT = 256


def p_value(counts: Counter[int], weighted: Sequence[tuple[int, float]]) -> float:
    """The p-value of a chi-square test. Tokens that are expected less than 10 times are counted together."""
    total = math.fsum(weight for _, weight in weighted)
    assert set(counts) <= {token_id for token_id, _ in weighted}, "a token was drawn that may not be"
    bins: list[tuple[int, float]] = []
    rare_seen, rare_expected = 0, 0.0
    for token_id, weight in weighted:
        expected = counts.total() * weight / total
        if expected >= 10:
            bins.append((counts[token_id], expected))
        else:
            rare_seen, rare_expected = rare_seen + counts[token_id], rare_expected + expected
    if rare_expected > 0:
        bins.append((rare_seen, rare_expected))
    assert len(bins) > 2
    statistic = math.fsum((seen - expected) ** 2 / max(expected, 1e-9) for seen, expected in bins)
    half = torch.tensor([(len(bins) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def draw_many(logits_V: torch.Tensor, num_draws: int = NUM_DRAWS, **params: Any) -> Counter[int]:
    """Draw with a different seed for every request."""
    counts: Counter[int] = Counter()
    rows = 500
    for start in range(0, num_draws, rows):
        requests = [make_request(row, seed=1000 + start + row, **params) for row in range(rows)]
        counts.update(token.token_id for token in choose(logits_V.expand(rows, -1), requests, num_likeliest=32))
    return counts


@pytest.fixture(scope="module")
def model_logits_V() -> torch.Tensor:
    """After a beginning that many words can follow."""
    return reference_logits((1, 1170, 565, 264, 596))[0].contiguous()


def test_all_tokens_of_the_bundled_model_by_their_probability(model_logits_V: torch.Tensor) -> None:
    weighted = distribution(model_logits_V.tolist(), make_request(temperature=1.0))
    assert len(weighted) == 4096
    counts = draw_many(model_logits_V, temperature=1.0)
    assert counts.total() == NUM_DRAWS
    assert p_value(counts, weighted) > 0.001


OUTPUTS = (5, 5, 5, 9, 17)  # places among the likeliest

CASES: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 2.0, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "presence_penalty": 1.0},
    {"temperature": 1.0, "frequency_penalty": -0.5},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "logit_bias": {0: -2.0, 200: 3.0}},
    {"temperature": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "top_p": 0.9},
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_the_likeliest_tokens_of_the_bundled_model(model_logits_V: torch.Tensor, params: dict[str, Any]) -> None:
    """20,000 draws with these parameters; without them the same draws do not fit."""
    logits_V = model_logits_V.sort(descending=True).values[:SHORT].contiguous()
    request = make_request(output_ids=OUTPUTS, **params)
    counts = draw_many(logits_V, output_ids=OUTPUTS, **params)
    assert counts.total() == NUM_DRAWS
    assert p_value(counts, distribution(logits_V.tolist(), request)) > 0.001
    plain = distribution(logits_V.tolist(), make_request(temperature=1.0))
    assert p_value(counts, plain) < 1e-6


def numbers_of(keys: Sequence[int], num_ids: int) -> torch.Tensor:
    """[keys, ids], exponentially distributed."""
    return to_exponential(random_bits(torch.tensor(keys), torch.arange(num_ids)))


@pytest.mark.parametrize(
    "numbers",
    [
        numbers_of([draw_key(seed, 0) for seed in range(NUM_DRAWS)], 1),
        numbers_of([draw_key(7, count) for count in range(NUM_DRAWS)], 1),
        numbers_of([draw_key(number, number) for number in range(NUM_DRAWS // 100)], 100),
        numbers_of([draw_key(7, 7)], NUM_DRAWS),
    ],
    ids=["seeds", "counts", "both, and tokens", "tokens"],
)
def test_the_numbers_are_exponential_over_seeds_counts_and_tokens(numbers: torch.Tensor) -> None:
    uniform = torch.exp(-numbers).flatten().tolist()
    counts = Counter(int(number * 100) for number in uniform)
    assert p_value(counts, [(i, 1.0) for i in range(100)]) > 0.001
    pairs = Counter(int(a * 10) * 10 + int(b * 10) for a, b in zip(uniform[::2], uniform[1::2], strict=True))
    assert p_value(pairs, [(i, 1.0) for i in range(100)]) > 0.001


def test_the_bits_are_those_of_the_published_generator() -> None:
    """SplitMix64 from 1234567: its first numbers, as other implementations have them."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [split_mix_64(1234567, number) for number in range(5)] == expected
    bits = random_bits(torch.tensor([1234567, -3]), torch.arange(5)).tolist()
    assert [number % 2**64 for number in bits[0]] == expected
    assert [number % 2**64 for number in bits[1]] == [split_mix_64(2**64 - 3, number) for number in range(5)]


def test_rounding_seldom_changes_a_token() -> None:
    """Flat logits, half of which are larger by 1e-5, which is more than the rounding in batches of other sizes."""
    logits_V = torch.zeros(4096, dtype=torch.float64)
    other_V = logits_V.clone()
    other_V[:2048] += 1e-5
    requests = [make_request(number, seed=number, temperature=1.0) for number in range(2000)]
    ids, other_ids = (
        [
            token.token_id
            for part in range(0, 2000, 500)
            for token in choose(row_V.expand(500, -1), requests[part:][:500])
        ]
        for row_V in (logits_V, other_V)
    )
    assert sum(a != b for a, b in zip(ids, other_ids, strict=True)) <= 1


# ---- edges


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.5}])
def test_a_temperature_near_zero_is_greedy(temperature: float, limits: dict[str, Any]) -> None:
    """`SamplingParams` allows it, and an error inside a step would end the engine for everybody."""
    requests = [make_request(number, seed=number, temperature=temperature, **limits) for number in range(20)]
    assert {token.token_id for token in choose(torch.tensor([[1.0, 30.0, -40.0]] * 20), requests)} == {1}


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 100.0])
@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9999}, {"top_k": 3}])
def test_logits_of_minus_infinity_are_never_drawn(temperature: float, limits: dict[str, Any]) -> None:
    requests = [make_request(number, seed=number, temperature=temperature, **limits) for number in range(20)]
    logits_NV = torch.tensor([[-math.inf, 1.0, -math.inf, -math.inf]] * 20)
    assert {token.token_id for token in choose(logits_NV, requests)} == {1}


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"top_k": 2}, {"presence_penalty": 1.0}, {"logprobs": 2}])
@pytest.mark.parametrize("num_likeliest", [1, 1024])
def test_logits_of_a_broken_model_do_not_end_the_engine(
    value: float, params: dict[str, Any], num_likeliest: int
) -> None:
    requests = [make_request(number, temperature=1.0, **params) for number in range(2)]
    logits_NV = torch.tensor([[value] * 8, [0.0, value] * 4])
    assert all(0 <= token.token_id < 8 for token in choose(logits_NV, requests, num_likeliest=num_likeliest))


def test_every_64_bits_give_a_number_that_can_be_divided_by() -> None:
    """Not 0, not infinite: a weight of 0 divided by it is 0, and never wins."""
    ends = [-(2**63), -(2**63) + 1, -4096, -1, 0, 1, 4095, 4096, 2**63 - 1]
    numbers = to_exponential(torch.tensor(ends)).tolist()
    assert min(numbers) > 0 and max(numbers) < 40
    assert numbers[4] == max(numbers) and numbers[3] == min(numbers)  # of no bits, and of all bits


def test_the_random_number_of_a_token_does_not_depend_on_limits() -> None:
    """The token that wins among all also wins among fewer, if it is one of them, so limits change little."""
    logits_V = torch.linspace(6, -6, 128)
    requests = [make_request(i, seed=i, temperature=1.0) for i in range(200)]
    free = [token.token_id for token in choose(logits_V.expand(200, -1), requests)]
    limited = [make_request(i, seed=i, temperature=1.0, top_k=20) for i in range(200)]
    for num_likeliest in (30, 16):  # 30 tokens of each row are put in order; 16 would be less than top_k, so it is all
        ids = [token.token_id for token in choose(logits_V.expand(200, -1), limited, num_likeliest=num_likeliest)]
        assert max(ids) < 20 and len(set(ids)) > 10
        assert all(a == b for a, b in zip(free, ids, strict=True) if a < 20)


def test_draws_that_need_more_than_the_likeliest_are_drawn_again() -> None:
    """Flat logits: 90 % of the tokens are needed, and 4 are put in order at first."""
    logits_NV = torch.zeros(400, 64)
    requests = [make_request(number, seed=number, temperature=1.0, top_p=0.9) for number in range(400)]
    few, all_ids = (
        [token.token_id for token in choose(logits_NV, requests, num_likeliest=count)] for count in (4, 1024)
    )
    assert few == all_ids
    assert max(few) == 57 and min(few) == 0, "58 of 64 equal tokens reach 90 %, and they are the first ones"


# ---- counts for penalties


def penalised(number: int, **params: Any) -> Request:
    return make_request(
        number, **{"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25} | params
    )


def test_counts_follow_the_tokens_over_many_steps_and_requests_that_come_and_go() -> None:
    """Every step equals plain Python; a row of the table is used again after its request has gone."""
    generator = torch.Generator().manual_seed(3)
    requests = {number: penalised(number, seed=number, temperature=1.0) for number in range(3)}
    sampler = make_sampler(list(requests.values()), VOCAB)
    sampler._requests = requests  # the scheduler's table, which changes
    for step in range(25):
        if step % 4 == 3:
            requests[step] = penalised(step, seed=step, prompt_ids=(step, 3), temperature=0.5)
            del requests[min(requests)]
        if step == 10:
            requests[max(requests)].sampling = None
        logits_NV = torch.randint(-16, 16, (len(requests), VOCAB), generator=generator) / 4
        expected = [
            reference_choice(row.double().tolist(), request)[0]
            for row, request in zip(logits_NV, requests.values(), strict=True)
        ]
        sampled = sampler(logits_NV.double(), make_batch(list(requests.values())))
        assert [token.token_id for token in sampled.tokens.values()] == expected
        for request, token_id in zip(requests.values(), expected, strict=True):
            request.output_ids.append(token_id)
    counts = sampler._chooser._counts
    assert counts is not None and len(counts.table_SV) == 8
    assert not counts.table_SV[0].any()


def test_only_new_tokens_are_counted() -> None:
    """A step of a long text costs as much as one of a short text."""
    request = penalised(0, prompt_ids=range(30), output_ids=range(20))
    sampler = make_sampler([request], VOCAB)
    sampler(torch.zeros(1, VOCAB), make_batch([request]))
    request.output_ids.append(7)
    counts = sampler._chooser._counts
    assert counts is not None
    slots, places, amounts = counts.place([request])
    assert (places, amounts) == ([slots[0] * VOCAB + 7], [1])


def test_min_tokens_hides_all_that_would_end() -> None:
    logits_V = torch.zeros(8)
    logits_V[EOS], logits_V[4], logits_V[6] = 3.0, 2.0, 1.0
    for num_tokens, expected in ((0, 6), (1, 6), (2, EOS)):
        request = make_request(output_ids=[5] * num_tokens, min_tokens=2, stop_token_ids=[4])
        assert choose(logits_V.unsqueeze(0), [request])[0].token_id == expected
    request = make_request(min_tokens=2, stop_token_ids=[4], ignore_eos=True)
    assert choose(logits_V.unsqueeze(0), [request])[0].token_id == EOS
