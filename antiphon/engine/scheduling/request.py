"""One request on the rank that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from antiphon.core.sampling import ResolvedParams


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
    """Sampled tokens and prompt results, by place in the batch.

    tokens: of the slices that reach the end of their request's text. prompt: of requests that want to know their
    prompt's logits or logprobs, where this step has computed positions not told before.
    """

    tokens: dict[int, NewToken] = field(default_factory=dict)
    prompt: dict[int, PromptPart] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request and its progress, owned by the scheduler."""

    # set by the front
    request_id: int
    prompt_ids: tuple[int, ...]
    params: ResolvedParams
    max_tokens: int  # what the model's length leaves of params.max_tokens
    seed: int
    # set by the scheduler
    block_ids: tuple[int, ...] = ()
    num_computed: int = 0  # tokens whose keys and values are in the cache
    output_ids: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they are known to the prefix cache
    known_keys: list[bytes] = field(default_factory=list)  # of its first blocks, kept while it waits
    num_cached: int = 0  # tokens that came from the prefix cache when it was first admitted
    num_preemptions: int = 0
    # set by the sampler
    num_reported: int = 0  # positions of the prompt whose logits or logprobs were handed out
    sampling: Any = None  # what it keeps for speed; rebuilt from prompt_ids and output_ids if dropped

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_missing(self) -> int:
        """Tokens that are known but not computed; computing the last of them gives a new one."""
        return self.num_tokens - self.num_computed

    @property
    def must_compute_prompt(self) -> bool:
        """Whether the request asks for prompt results that the prefix cache does not keep."""
        return self.params.wants_prompt and self.num_reported < len(self.prompt_ids)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The tokens from `start` to `stop` of the text, prompt and output together."""
        num_prompt = len(self.prompt_ids)
        if stop <= num_prompt:
            return self.prompt_ids[start:stop]
        return (*self.prompt_ids[start:], *self.output_ids[max(0, start - num_prompt) : stop - num_prompt])


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """What a step has found of one request: a new token, a part of what was asked of its prompt, or both.

    stop_reason: the token of stop_token_ids that ended it, or the stop string; `None` for the end-of-sequence token.
    """

    request_id: int
    token: NewToken | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt: PromptPart | None = None
    num_cached: int = 0
