"""The sampler fed with logits, and the same choice in plain Python, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from antiphon.core.batch import Batch, RequestSlice
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.sampling.draw import draw_key
from antiphon.engine.sampling.sampler import Sampler
from antiphon.engine.scheduling.request import NewToken, Request

EOS = 2


def make_request(
    number: int = 0,
    *,
    prompt_ids: Sequence[int] = (0, 1, 2),
    output_ids: Sequence[int] = (),
    seed: int = 0,
    **params: Any,
) -> Request:
    request = Request(
        request_id=number, prompt_ids=tuple(prompt_ids), params=ResolvedParams(**params), max_tokens=10, seed=seed
    )
    request.output_ids.extend(output_ids)
    return request


def make_batch(requests: Sequence[Request], query_lens: Sequence[int] | None = None) -> Batch:
    """Slices that reach the end of their requests' texts."""
    lengths = [1] * len(requests) if query_lens is None else query_lens
    slices = [
        RequestSlice(
            request_id=request.request_id,
            token_ids=(1,) * length,
            context_len=request.num_tokens - length,
            block_ids=(1,),
        )
        for request, length in zip(requests, lengths, strict=True)
    ]
    return Batch(rank=0, requests=tuple(slices))


def make_sampler(requests: Sequence[Request], vocab_size: int, **options: Any) -> Sampler:
    """Hidden states are the logits."""
    return Sampler(
        lambda hidden_ND: hidden_ND,
        {request.request_id: request for request in requests},
        vocab_size=vocab_size,
        eos_token_ids=(EOS,),
        **options,
    )


def choose(logits_NV: torch.Tensor, requests: Sequence[Request], **options: Any) -> list[NewToken]:
    """One step in which every request gets a token."""
    sampled = make_sampler(requests, logits_NV.shape[1], **options)(logits_NV, make_batch(requests))
    assert list(sampled.tokens) == list(range(len(requests)))
    return list(sampled.tokens.values())


def edited(logits: Sequence[float], request: Request) -> list[float]:
    """Logits after biases, min_tokens and penalties."""
    params, outputs = request.params, request.output_ids
    edited = list(logits)
    for token_id, bias in (params.logit_bias or {}).items():
        edited[token_id] += bias
    if len(outputs) < params.min_tokens:
        for token_id in (*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS,))):
            edited[token_id] = -math.inf
    for token_id in {*request.prompt_ids, *outputs}:
        factor = params.repetition_penalty
        edited[token_id] = edited[token_id] / factor if edited[token_id] > 0 else edited[token_id] * factor
    for token_id in set(outputs):
        edited[token_id] -= params.frequency_penalty * outputs.count(token_id) + params.presence_penalty
    return edited


def distribution(logits: Sequence[float], request: Request) -> list[tuple[int, float]]:
    """The tokens that may be drawn with their weights, which do not add up to 1."""
    params, logits = request.params, edited(logits, request)
    best = max(logits)
    if params.temperature == 0:
        return [(logits.index(best), 1.0)]
    weights = [math.exp((logit - best) / params.temperature) for logit in logits]
    order = list(range(len(weights)))
    top_k = params.top_k if params.top_k > 0 else len(order)
    if params.top_p < 1 or top_k < len(order):
        order.sort(key=lambda i: (-logits[i], i))
        order = order[:top_k]
    if params.top_p < 1:
        enough, reached, kept = params.top_p * sum(weights[i] for i in order), 0.0, []
        for i in order:
            if reached < enough:
                kept.append(i)
            reached += weights[i]
        order = kept
    return [(i, weights[i]) for i in order if weights[i] >= params.min_p and weights[i] > 0]


def split_mix_64(key: int, number: int) -> int:
    """64 bits: number `number`, from 0, of the generator that starts at the key."""
    most = 2**64 - 1
    bits = (key + (number + 1) * 0x9E3779B97F4A7C15) & most
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & most
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & most
    return bits ^ (bits >> 31)


def reference_choice(logits: Sequence[float], request: Request) -> tuple[int, float]:
    """The token, and by which part of its own chance the next one was worse."""
    key = draw_key(request.seed, len(request.output_ids))

    def chance(token_id: int, weight: float) -> float:
        return weight / -math.log(((split_mix_64(key, token_id) >> 12) + 0.5) / 2**52)

    chances = sorted(((chance(*item), item[0]) for item in distribution(logits, request)), reverse=True)
    best, second = chances[0], chances[1] if len(chances) > 1 else (0.0, -1)
    return best[1], 1 - second[0] / best[0]
