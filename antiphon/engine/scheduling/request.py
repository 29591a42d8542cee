"""A request on the rank that runs it, and what a step finds for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from antiphon.core.batch import PENDING_TOKEN
from antiphon.core.sampling import ResolvedParams


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A token with its logprobs and logits, if requested.

    logprob: natural logarithm of its probability by the model. rank: 1 for the likeliest token.
    top: the likeliest tokens with their logprobs, likeliest first. logits: bytes in the engine's logits dtype.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None
    logits: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPart:
    """Results for the positions of a prompt that a step has computed, in order. Each position is reported once.

    logits: [positions, V] as bytes. logprobs: of the prompt's token after each position, so none for the last position.
    """

    logits: bytes | None = None
    logprobs: list[NewToken] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Sampled:
    """Sampled tokens and prompt results, by place in the batch.

    tokens: for slices that reach the end of their request's text. prompt: for requests that want logits or logprobs of
    their prompt, if this step has computed positions that were not reported before.
    """

    tokens: dict[int, NewToken] = field(default_factory=dict)
    prompt: dict[int, PromptPart] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request and its progress, owned by the scheduler."""

    # set by the frontend
    request_id: int
    prompt_ids: tuple[int, ...]
    params: ResolvedParams
    max_tokens: int  # params.max_tokens, limited by the model's length
    seed: int
    # set by the scheduler
    block_ids: list[int] = field(default_factory=list)  # grows in place; a new list after a preemption
    num_computed: int = 0  # tokens whose keys and values are in the cache, or will be once the launched steps have run
    num_pending: int = 0  # new tokens of launched steps that the host does not know yet
    output_ids: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full blocks that are in the prefix cache
    known_keys: list[bytes] = field(default_factory=list)  # of its first blocks, kept while it waits
    num_cached: int = 0  # tokens found in the prefix cache when it was first admitted
    num_preemptions: int = 0
    # set by the sampler
    num_reported: int = 0  # positions of the prompt whose logits or logprobs were reported
    sampling: Any = None  # a cache, rebuilt from prompt_ids and output_ids if dropped

    @property
    def num_outputs(self) -> int:
        """New tokens, including those that the host does not know yet."""
        return len(self.output_ids) + self.num_pending

    @property
    def num_known(self) -> int:
        """Tokens that the host knows."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the text so far, including those that the host does not know yet."""
        return len(self.prompt_ids) + len(self.output_ids) + self.num_pending

    @property
    def num_missing(self) -> int:
        """Tokens that are not computed. Computing the last of them yields a new token.

        0 if the last token of the text is on its way: nothing follows it.
        """
        if self.num_pending and self.num_outputs >= self.max_tokens:
            return 0
        return self.num_tokens - self.num_computed

    @property
    def must_compute_prompt(self) -> bool:
        """Whether the request still needs prompt results, which the prefix cache does not keep."""
        return self.params.wants_prompt and self.num_reported < len(self.prompt_ids)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens `start` to `stop` of the text, which is prompt and output together.

        `PENDING_TOKEN` stands for those that the host does not know yet.
        """
        num_prompt = len(self.prompt_ids)
        if stop <= num_prompt:
            return self.prompt_ids[start:stop]
        known = (*self.prompt_ids[start:], *self.output_ids[max(0, start - num_prompt) : stop - num_prompt])
        return known + (PENDING_TOKEN,) * (stop - max(start, self.num_known))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """What a step has computed for one request: a new token, results for its prompt, or both.

    stop_reason: the stop string or the token of stop_token_ids that ended it; `None` for the end-of-sequence token.
    """

    request_id: int
    token: NewToken | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt: PromptPart | None = None
    num_cached: int = 0
