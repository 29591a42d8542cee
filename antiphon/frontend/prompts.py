"""Checks the prompts and sampling parameters of callers, and turns them into requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from numbers import Integral
from typing import Any

import torch

from antiphon.config.engine_config import ResolvedConfig
from antiphon.core.errors import PromptLengthError, RequestError, is_whole, unicode_fault
from antiphon.core.sampling import ResolvedParams, SamplingParams
from antiphon.engine.scheduling.request import Request
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""

_KEYS = ("prompt", "prompt_token_ids")

_MOST_LOGITS_BYTES = 2**31  # msgpack allows twice that


def plain_ints(items: Sequence[Any]) -> list[Any]:
    """Convert integers of other libraries, such as NumPy's, to Python's. Anything else stays as it is."""
    ids = list(items)
    if set(map(type, ids)) <= {int}:  # a fast path, because prompts have thousands of tokens
        return ids
    return [item if isinstance(item, bool) or not isinstance(item, Integral) else int(item) for item in ids]


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[str | Sequence[int]]:
    """Return the prompts as a list, even if there is only one. Raises `RequestError` for anything else."""
    if isinstance(prompts, str | Mapping):
        return [content_of(0, prompts)]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise _wrong(f"prompts is a {type(prompts).__name__}", "pass a text, a list of texts, or token ids", prompts)
    if prompts and all(isinstance(item, Integral) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return [content_of(place, prompt) for place, prompt in enumerate(prompts)]  # type: ignore[arg-type]


def content_of(place: int, prompt: Prompt) -> str | Sequence[int]:
    """Return the text or the token ids of one prompt. Raises `RequestError` for anything else."""
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or next(iter(prompt)) not in _KEYS:
            keys = f"has the keys {', '.join(map(repr, prompt))}" if prompt else "is an empty dict"
            raise _wrong(f"prompt {place} {keys}", f"give exactly one of {' and '.join(map(repr, _KEYS))}", prompt)
        ((key, prompt),) = prompt.items()
        if isinstance(prompt, str) is not (key == "prompt"):
            raise _no_prompt(place, prompt)
    if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
        raise _no_prompt(place, prompt)
    return prompt


def _no_prompt(place: int, value: object) -> RequestError:
    return _wrong(f"prompt {place} is a {type(value).__name__}", "pass a text or a list of token ids", value)


def _wrong(fact: str, remedy: str, value: object = None) -> RequestError:
    return RequestError(fact, remedy=remedy, option="prompts", value=value)


def params_for(
    prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """Return one `SamplingParams` per prompt. Raises `RequestError` for a wrong number or type."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * len(prompts)
    if not isinstance(sampling_params, Sequence) or not all(isinstance(p, SamplingParams) for p in sampling_params):
        fact, remedy = "sampling_params has the wrong type", "pass one SamplingParams, or a list of them"
        raise RequestError(fact, remedy=remedy, option="sampling_params", value=sampling_params)
    if len(sampling_params) != len(prompts):
        fact = f"there are {len(prompts)} prompts and {len(sampling_params)} sampling_params"
        raise RequestError(fact, remedy="pass one for all prompts, or one for each", option="sampling_params")
    return list(sampling_params)


def child_seed(seed: int, index: int) -> int:
    """Derive the seed of result `index` of a prompt. The first gets `seed` itself, so it does not depend on n."""
    if not index:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8, person=b"child").digest()
    return int.from_bytes(digest, "little") >> 1


class RequestMaker:
    """Makes all requests of an engine, with their ids and seeds."""

    def __init__(self, config: ResolvedConfig, tokenizer: Tokenizer | NoTokenizer) -> None:
        self._config = config
        self._capacity = config.kv_capacity_tokens
        self._defaults = dict(config.model.sampling_defaults)
        self._tokenizer = tokenizer
        self._num_prompts = 0
        self._num_requests = 0

    def make(self, prompts: Sequence[Prompt], params_list: Sequence[SamplingParams]) -> list[list[Request]]:
        """Make one request for each of the n results of every prompt. Raises `RequestError` if any prompt is wrong.

        A prompt without a seed gets the engine's, plus the number of prompts before it. Only the first of its requests
        asks for the prompt's logits and logprobs.
        """
        token_lists = [self._token_ids(place, prompt) for place, prompt in enumerate(prompts)]
        made = []
        number = self._num_requests
        for place, (ids, params) in enumerate(zip(token_lists, params_list, strict=True)):
            resolved = self._resolved(place, ids, params)
            seed = params.seed if params.seed is not None else self._config.options.seed + self._num_prompts + place
            others = replace(resolved, prompt_logprobs=None, return_prompt_logits=False)
            made.append(
                [
                    Request(
                        request_id=number + index,
                        prompt_ids=tuple(ids),
                        params=others if index else resolved,
                        max_tokens=resolved.max_tokens or 1,
                        seed=child_seed(seed, index),
                    )
                    for index in range(params.n)
                ]
            )
            number += params.n
        self._num_prompts, self._num_requests = self._num_prompts + len(token_lists), number
        return made

    def _resolved(self, place: int, prompt_ids: list[int], given: SamplingParams) -> ResolvedParams:
        """Return the parameters of one result, limited to what the model and the cache allow."""
        config, num_prompt = self._config, len(prompt_ids)
        params = given.resolve(self._defaults)
        vocab_size = config.model.vocab_size
        room = config.max_model_len - num_prompt
        if room < 1:
            raise PromptLengthError(
                f"prompt {place} has {num_prompt} tokens",
                limit=f"max_model_len={config.max_model_len} leaves room for {config.max_model_len - 1}",
                remedy="shorten it",
                option="prompts",
                value=num_prompt,
            )
        # The last token of an output is never computed, so it takes no room in the cache.
        room_in_cache = self._capacity + 1 - num_prompt
        max_tokens = min(room, max(1, room_in_cache)) if params.max_tokens is None else min(params.max_tokens, room)
        if max_tokens > room_in_cache:
            raise PromptLengthError(
                f"prompt {place} and its output need {num_prompt + max_tokens - 1} tokens of KV cache",
                limit=f"a rank holds {self._capacity}",
                remedy="lower max_tokens or raise kv_cache_memory",
                option="prompts",
                value=num_prompt + max_tokens - 1,
            )
        if params.return_prompt_logits:
            self._check_logits(place, num_prompt)
        _check_ids(place, "logit_bias", params.logit_bias or (), vocab_size)
        _check_ids(place, "stop_token_ids", params.stop_token_ids or (), vocab_size)
        if params.stops and not self._tokenizer.has_text:
            raise RequestError(
                f"prompt {place} has stop strings",
                limit="there is no text with dummy weights",
                remedy="use stop_token_ids",
                option="stop",
            )
        return replace(
            params,
            n=1,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            top_k=min(params.top_k, vocab_size),
        )

    def _check_logits(self, place: int, num_prompt: int) -> None:
        """Raise `RequestError` if the prompt logits of one step do not fit into one message."""
        config = self._config
        num_positions = min(num_prompt, config.max_num_batched_tokens)
        num_bytes = num_positions * config.model.vocab_size * torch.promote_types(config.dtype, torch.float32).itemsize
        if config.options.ranks > 1 and num_bytes > _MOST_LOGITS_BYTES:
            raise RequestError(
                f"prompt {place} asks for {num_bytes / 2**30:.1f} GiB of logits in one step",
                limit=f"a rank can send {_MOST_LOGITS_BYTES // 2**30} GiB",
                remedy="use prompt_logprobs, or lower max_num_batched_tokens",
                option="return_prompt_logits",
                value=True,
            )

    def _token_ids(self, place: int, prompt: Prompt) -> list[int]:
        vocab_size = self._config.model.vocab_size
        prompt = content_of(place, prompt)
        if isinstance(prompt, str):
            if fault := unicode_fault(prompt):
                raise _wrong(f"prompt {place} is not valid Unicode: {fault}", "repair or drop it")
            ids = self._tokenizer.encode(prompt)
        else:
            ids = plain_ints(prompt)
        if not ids:
            raise _wrong(f"prompt {place} is empty", "give at least one token", prompt)
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
            return ids
        for token_id in ids:
            if not is_whole(token_id) or not 0 <= token_id < vocab_size:
                raise _wrong(f"prompt {place} has token id {token_id!r}", f"use 0 to {vocab_size - 1}", token_id)
        return ids


def _check_ids(place: int, name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if token_id >= vocab_size:
            fact, remedy = f"{name} of prompt {place} has token id {token_id}", f"use 0 to {vocab_size - 1}"
            raise RequestError(fact, remedy=remedy, option=name, value=token_id)
