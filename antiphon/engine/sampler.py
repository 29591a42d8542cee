"""From hidden states to the next token of every request.

On a GPU greedy tokens are chosen there, and come to the host in one copy; only the logits of requests that draw or
want them follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from antiphon.core.batch import Batch
from antiphon.core.upload import upload
from antiphon.engine.request import Request

__all__ = ["Sampled", "Sampler", "choose_token"]

_MOST_LOGITS = 1024
"""Rows of prompt logits at once: those of a long prompt can be larger than the memory that the cache leaves."""


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
        requests = [self._requests[part.request_id] for part in batch.requests]
        ends = list(accumulate(batch.query_lens))
        on_host = [place for place, request in enumerate(requests) if _needs_logits(request)]
        last_N, on_host_M = upload([torch.tensor(ends) - 1, torch.tensor(on_host, dtype=torch.int64)], hidden_TD.device)
        logits_NV = self._to_logits(hidden_TD[last_N])
        host_logits_MV = logits_NV[on_host_M].cpu() if on_host else None
        sampled.token_ids = logits_NV.argmax(-1).tolist()
        for row, place in enumerate(on_host):
            assert host_logits_MV is not None
            request, logits_V = requests[place], host_logits_MV[row]
            if request.params.temperature > 0:
                sampled.token_ids[place] = choose_token(logits_V, request)
            if request.params.return_logits:
                sampled.logits[place] = _to_bytes(logits_V)
            if request.params.return_prompt_logits and not request.output_ids:
                start = ends[place] - batch.requests[place].query_len
                parts = torch.split(hidden_TD[start : ends[place]], _MOST_LOGITS)
                sampled.prompt_logits[place] = b"".join(_to_bytes(self._to_logits(part).cpu()) for part in parts)
        return sampled


def _needs_logits(request: Request) -> bool:
    params = request.params
    return params.temperature > 0 or params.return_logits or params.return_prompt_logits


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
