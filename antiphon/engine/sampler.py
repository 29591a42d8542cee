"""From hidden states to the next token of every request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from antiphon.core.batch import Batch
from antiphon.engine.request import Request

__all__ = ["Sampled", "Sampler", "choose_token"]


@dataclass(slots=True, kw_only=True)
class Sampled:
    """One token for each request of the batch, and logits as bytes for the requests (by place) that want them."""

    token_ids: list[int] = field(default_factory=list)
    logits: dict[int, bytes] = field(default_factory=dict)
    prompt_logits: dict[int, bytes] = field(default_factory=dict)


class Sampler:
    """Chooses tokens. `to_logits` maps hidden states [N, D] to logits [N, V]; `requests` is the scheduler's table."""

    def __init__(self, to_logits: Callable[[torch.Tensor], torch.Tensor], requests: Mapping[int, Request]) -> None:
        self._to_logits = to_logits
        self._requests = requests

    @torch.inference_mode()
    def __call__(self, hidden_TD: torch.Tensor, batch: Batch) -> Sampled:
        """The hidden state of each request's last token decides."""
        sampled = Sampled()
        if not batch.requests:
            return sampled
        ends = torch.tensor(batch.query_lens).cumsum(0)
        logits_NV = self._to_logits(hidden_TD[ends - 1])
        greedy_N = logits_NV.argmax(-1).tolist()
        for place, (part, end) in enumerate(zip(batch.requests, ends.tolist(), strict=True)):
            request = self._requests[part.request_id]
            if request.params.temperature > 0:
                sampled.token_ids.append(choose_token(logits_NV[place], request))
            else:
                sampled.token_ids.append(greedy_N[place])
            if request.params.return_logits:
                sampled.logits[place] = _to_bytes(logits_NV[place])
            if request.params.return_prompt_logits and not request.output_ids:
                sampled.prompt_logits[place] = _to_bytes(self._to_logits(hidden_TD[end - part.query_len : end]))
        return sampled


def choose_token(logits_V: torch.Tensor, request: Request) -> int:
    """Draw from softmax(logits / temperature), cut to `top_k` and then `top_p`, by the request's own generator."""
    params = request.params
    if request.generator is None:
        request.generator = torch.Generator().manual_seed(request.seed)
    # From the largest down, in float64: a tiny temperature gives -inf, which is no weight, and never nan.
    logits, token_ids = logits_V.to(torch.float64).sort(descending=True, stable=True)
    logits = (logits - logits[0]) / params.temperature
    if params.top_k:
        logits = logits[: params.top_k]
    weights = logits.softmax(-1)
    if params.top_p < 1:
        weights = weights[weights.cumsum(0) - weights < params.top_p]
    return int(token_ids[torch.multinomial(weights, 1, generator=request.generator)])


def _to_bytes(logits: torch.Tensor) -> bytes:
    return logits.contiguous().numpy().tobytes()
