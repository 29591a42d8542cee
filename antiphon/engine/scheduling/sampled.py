"""What the sampler has found out in one step, for the scheduler and, by messages, for the front."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A token and, where they were asked for, how likely it was.

    logprob: natural logarithm of its probability by the model. rank: 1 for the likeliest token.
    top: the likeliest tokens with their logprobs, likeliest first. logits: as bytes of the engine's logits dtype.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None
    logits: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPart:
    """What a step tells of the positions of a prompt that it has computed, in order, each position once.

    logits: [positions, V] as bytes. logprobs: of the prompt's next token after each position, so none after the last.
    """

    logits: bytes | None = None
    logprobs: list[NewToken] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Sampled:
    """By place in the batch.

    tokens: of the slices that reach the end of their request's text. prompt: of requests that want to know their
    prompt's logits or logprobs, where this step has computed positions not told before.
    """

    tokens: dict[int, NewToken] = field(default_factory=dict)
    prompt: dict[int, PromptPart] = field(default_factory=dict)
