"""One request on the rank that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from antiphon.core.sampling import SamplingParams

__all__ = ["Request", "TokenOutput"]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Owned by the scheduler."""

    # set by the front
    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int  # what the model's length leaves of params.max_tokens
    seed: int
    # set by the scheduler
    block_ids: tuple[int, ...] = ()
    num_computed: int = 0  # tokens whose keys and values are in the cache
    output_ids: list[int] = field(default_factory=list)
    # set by the sampler
    generator: torch.Generator | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def most_tokens(self) -> int:
        """Tokens that can ever be in the cache: the last one that is generated is never computed."""
        return len(self.prompt_ids) + self.max_tokens - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """One new token of one request; `logits` as bytes of the engine's logits dtype, where they were asked for."""

    request_id: int
    token_id: int
    finish_reason: str | None
    logits: bytes | None = None
    prompt_logits: bytes | None = None
