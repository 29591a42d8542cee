"""How a request is sampled, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from antiphon.core.checks import is_number, is_whole
from antiphon.core.errors import OptionError

__all__ = ["GeneratedOutput", "SamplingParams"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request.

    max_tokens: most tokens to generate, at least 1.
    temperature: 0 is greedy (the default); above it, logits are divided by it before sampling.
    top_k: sample among the k likeliest tokens; 0 means all.
    top_p: sample among the likeliest tokens that together reach this probability, in (0, 1].
    seed: the same seed gives the same tokens whatever else is in the batch; `None` takes one from the engine.
    ignore_eos: go on past the end-of-sequence token.
    return_logits: keep the logits behind every generated token (float32, or float64 in a float64 engine).
    return_prompt_logits: keep the logits at every position of the prompt. Both are large; they are for checking.

    Raises `OptionError` for a value out of range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    return_logits: bool = False
    return_prompt_logits: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in _LIMITS:
                _check_number(field.name, getattr(self, field.name))
            elif field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise OptionError(f"{field.name}={getattr(self, field.name)!r} is not True or False")
        if self.seed is not None and (not is_whole(self.seed) or not 0 <= self.seed < 2**63):
            raise OptionError(f"seed={self.seed!r} is not an integer from 0 to 2**63 - 1; pass one, or None")


_LIMITS: dict[str, tuple[float, float, bool, str]] = {
    "max_tokens": (1, math.inf, True, "an integer of at least 1"),
    "temperature": (0.0, 100.0, False, "a number from 0 (greedy) to 100"),
    "top_k": (0, math.inf, True, "an integer of at least 0 (0: all tokens)"),
    "top_p": (math.ulp(0.0), 1.0, False, "a number above 0 and at most 1"),
}


def _check_number(name: str, value: object) -> None:
    low, high, whole, text = _LIMITS[name]
    right_type = is_whole(value) if whole else is_number(value)
    if not right_type or not low <= value <= high:  # type: ignore[operator]
        raise OptionError(f"{name}={value!r} is out of range; use {text}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedOutput:
    """The result of one request, owned by the caller.

    `finish_reason` is `"stop"` (an end-of-sequence token, the last of `token_ids`) or `"length"`.
    `logits` [len(token_ids), V] and `prompt_logits` [len(prompt_token_ids), V] are on the CPU, if asked for.
    """

    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    logits: torch.Tensor | None = None
    prompt_logits: torch.Tensor | None = None
