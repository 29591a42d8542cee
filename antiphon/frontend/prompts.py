"""What a caller may pass as prompts and sampling parameters, checked and made into requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from numbers import Integral
from typing import Any

import torch

from antiphon.config.engine_config import ResolvedConfig
from antiphon.core.errors import RequestError, is_whole, unicode_fault
from antiphon.core.sampling import ResolvedParams, SamplingParams
from antiphon.engine.scheduling.request import Request
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""

_KEYS = ("prompt", "prompt_token_ids")

_MOST_LOGITS_BYTES = 2**31  # msgpack ends at twice that


def plain_ints(items: Sequence[Any]) -> list[Any]:
    """Integers of other libraries (numpy's, say) as Python's; what is no integer as it is."""
    ids = list(items)
    if set(map(type, ids)) <= {int}:  # the usual case, at the speed of C: prompts have many thousand tokens
        return ids
    return [item if isinstance(item, bool) or not isinstance(item, Integral) else int(item) for item in ids]


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[str | Sequence[int]]:
    """Texts or token ids; one prompt alone is a list of one. Raises `RequestError` for what is no prompt."""
    if isinstance(prompts, str | Mapping):
        return [content_of(0, prompts)]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}",
            remedy="pass a text, a list of texts, or token ids",
            option="prompts",
        )
    if prompts and all(isinstance(item, Integral) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return [content_of(place, prompt) for place, prompt in enumerate(prompts)]  # type: ignore[arg-type]


def content_of(place: int, prompt: Prompt) -> str | Sequence[int]:
    """The text or the token ids of one prompt. Raises `RequestError` for what is no prompt."""
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or next(iter(prompt)) not in _KEYS:
            raise RequestError(
                f"prompt {place} has the keys {', '.join(map(repr, prompt)) or 'of none'}",
                remedy=f"give exactly one of {' and '.join(map(repr, _KEYS))}",
                option="prompts",
                value=prompt,
            )
        ((key, prompt),) = prompt.items()
        if isinstance(prompt, str) is not (key == "prompt"):
            raise _no_prompt(place, prompt)
    if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
        raise _no_prompt(place, prompt)
    return prompt


def _no_prompt(place: int, value: object) -> RequestError:
    remedy = "pass a text or a list of token ids"
    return RequestError(f"prompt {place} is a {type(value).__name__}", remedy=remedy, option="prompts", value=value)


def params_for(
    prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """One item for each prompt. Raises `RequestError` for another number of them, or another type."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * len(prompts)
    if not isinstance(sampling_params, Sequence) or not all(isinstance(p, SamplingParams) for p in sampling_params):
        raise RequestError("sampling_params holds something else; pass one SamplingParams, or a list of them")
    if len(sampling_params) != len(prompts):
        raise RequestError(
            f"there are {len(prompts)} prompts and {len(sampling_params)} sampling_params; pass one, or one each"
        )
    return list(sampling_params)


def child_seed(seed: int, index: int) -> int:
    """Of result `index` of a prompt: `seed` itself for the first, so that it does not depend on n."""
    if not index:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8, person=b"child").digest()
    return int.from_bytes(digest, "little") >> 1


class RequestMaker:
    """Makes requests with numbers and seeds of their own; every request of a front process comes from one of these."""

    def __init__(self, config: ResolvedConfig, tokenizer: Tokenizer | NoTokenizer) -> None:
        self._config = config
        self._capacity = config.kv_capacity_tokens
        self._defaults = dict(config.model.sampling_defaults)
        self._tokenizer = tokenizer
        self._num_prompts = 0
        self._num_requests = 0

    def make(self, prompts: Sequence[Prompt], params_list: Sequence[SamplingParams]) -> list[list[Request]]:
        """For each prompt one request for each of its n results. All or none: a wrong prompt raises `RequestError`.

        A prompt without a seed gets the engine's, plus the number of prompts before it. What is asked of the prompt
        itself is asked of the first request only.
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
        """The parameters of one result, within what the model and the cache allow."""
        config, num_prompt = self._config, len(prompt_ids)
        params = given.resolve(self._defaults)
        vocab_size = config.model.vocab_size
        room = config.max_model_len - num_prompt
        if room < 1:
            raise RequestError(
                f"prompt {place} has {num_prompt} tokens, but max_model_len={config.max_model_len} leaves room for "
                f"{config.max_model_len - 1}; shorten it"
            )
        # The last token of an output is never computed, so it needs no place in the cache.
        room_in_cache = self._capacity + 1 - num_prompt
        max_tokens = min(room, max(1, room_in_cache)) if params.max_tokens is None else min(params.max_tokens, room)
        if max_tokens > room_in_cache:
            raise RequestError(
                f"prompt {place} and its output need {num_prompt + max_tokens - 1} tokens of KV cache, but a rank "
                f"holds {self._capacity}; lower max_tokens or raise kv_cache_memory"
            )
        if params.return_prompt_logits:
            self._check_logits(place, num_prompt)
        _check_ids(place, "logit_bias", params.logit_bias or (), vocab_size)
        _check_ids(place, "stop_token_ids", params.stop_token_ids or (), vocab_size)
        if params.stops and not self._tokenizer.has_text:
            raise RequestError(
                f"prompt {place} has stop strings, but a run with dummy weights has no texts; use stop_token_ids"
            )
        return replace(
            params,
            n=1,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            top_k=min(params.top_k, vocab_size),
        )

    def _check_logits(self, place: int, num_prompt: int) -> None:
        """What a step has of a prompt's logits travels in one message."""
        config = self._config
        num_positions = min(num_prompt, config.max_num_batched_tokens)
        num_bytes = num_positions * config.model.vocab_size * torch.promote_types(config.dtype, torch.float32).itemsize
        if config.options.ranks > 1 and num_bytes > _MOST_LOGITS_BYTES:
            raise RequestError(
                f"prompt {place} asks for {num_bytes / 2**30:.1f} GiB of logits in one step, but a rank can send "
                f"{_MOST_LOGITS_BYTES // 2**30} GiB; use prompt_logprobs, or lower max_num_batched_tokens"
            )

    def _token_ids(self, place: int, prompt: Prompt) -> list[int]:
        vocab_size = self._config.model.vocab_size
        prompt = content_of(place, prompt)
        if isinstance(prompt, str):
            if fault := unicode_fault(prompt):
                raise RequestError(f"prompt {place} is not valid Unicode text ({fault}); repair or drop it")
            ids = self._tokenizer.encode(prompt)
        else:
            ids = plain_ints(prompt)
        if not ids:
            raise RequestError(f"prompt {place} is empty; give at least one token")
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
            return ids
        for token_id in ids:
            if not is_whole(token_id) or not 0 <= token_id < vocab_size:
                raise RequestError(f"prompt {place} has token id {token_id!r}; use integers from 0 to {vocab_size - 1}")
        return ids


def _check_ids(place: int, name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if token_id >= vocab_size:
            raise RequestError(
                f"{name} of prompt {place} has token id {token_id}; use integers from 0 to {vocab_size - 1}"
            )
