"""What a caller may pass as prompts and sampling parameters, brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from antiphon.core.errors import RequestError
from antiphon.core.sampling import SamplingParams

__all__ = ["Prompt", "params_for", "plain_ints", "prompt_list"]

Prompt = str | Sequence[int]


def plain_ints(items: Sequence[Any]) -> list[Any]:
    """Integers of other libraries (numpy's, say) as Python's; what is no integer as it is."""
    ids = list(items)
    if set(map(type, ids)) <= {int}:  # the usual case, at the speed of C: prompts have many thousand tokens
        return ids
    return [item if isinstance(item, bool) or not isinstance(item, Integral) else int(item) for item in ids]


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, text or token ids, as a list of one. Raises `RequestError` for what is no prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(f"prompts is a {type(prompts).__name__}; pass a text, a list of texts, or token ids")
    if prompts and all(isinstance(item, Integral) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
            raise RequestError(f"prompt {place} is a {type(prompt).__name__}; pass a text or a list of token ids")
    return list(prompts)  # type: ignore[arg-type]


def params_for(
    prompts: list[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
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
