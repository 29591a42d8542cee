"""From hidden states to the next token of every request.

On a GPU greedy tokens are chosen there, and come to the host in one copy; only the logits of requests that draw or
want them follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from itertools import accumulate

import torch

from antiphon.core.batch import Batch
from antiphon.core.upload import upload
from antiphon.engine.request import Request
from antiphon.engine.sampled import NewToken, PromptPart, Sampled

__all__ = ["NewToken", "PromptPart", "Sampled", "Sampler", "choose_token"]

_MOST_LOGITS = 1024
"""Rows of prompt logits at once: those of a long prompt can be larger than the memory that the cache leaves."""


class Sampler:
    """Chooses tokens. `to_logits` maps hidden states [N, D] to logits [N, V]; `requests` is the scheduler's table."""

    def __init__(self, to_logits: Callable[[torch.Tensor], torch.Tensor], requests: Mapping[int, Request]) -> None:
        self._to_logits = to_logits
        self._requests = requests

    @torch.inference_mode()
    def __call__(self, hidden_TD: torch.Tensor, batch: Batch) -> Sampled:
        """The hidden state of the last token decides, where a slice reaches the end of its request's text."""
        sampled = Sampled()
        requests = [self._requests[part.request_id] for part in batch.requests]
        ends = list(accumulate(batch.query_lens))
        places = [
            place
            for place, (request, part) in enumerate(zip(requests, batch.requests, strict=True))
            if part.context_len + part.query_len == request.num_tokens
        ]
        if places:
            (last_N,) = upload([torch.tensor([ends[place] - 1 for place in places])], hidden_TD.device)
            logits_NV = self._to_logits(hidden_TD[last_N])
            best = logits_NV.argmax(-1).tolist()
            for row, place in enumerate(places):
                params = requests[place].params
                token_id = choose_token(logits_NV[row].cpu(), requests[place]) if params.temperature else best[row]
                logits = _to_bytes(logits_NV[row].cpu()) if params.return_logits else None
                sampled.tokens[place] = NewToken(token_id=token_id, logits=logits)
        for place, (request, part) in enumerate(zip(requests, batch.requests, strict=True)):
            if not request.params.return_prompt_logits:
                continue
            first = max(part.context_len, request.num_reported)
            last = min(part.context_len + part.query_len, len(request.prompt_ids))
            if first < last:
                row = ends[place] - part.query_len - part.context_len
                parts = torch.split(hidden_TD[row + first : row + last], _MOST_LOGITS)
                logits = b"".join(_to_bytes(self._to_logits(part).cpu()) for part in parts)
                sampled.prompt[place] = PromptPart(logits=logits)
                request.num_reported = last
        return sampled


def uniform(seed: int, count: int) -> float:
    """In [0, 1), from the request's seed and the number of its tokens so far alone."""
    digest = blake2b(seed.to_bytes(8, "little") + count.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose_token(logits_V: torch.Tensor, request: Request) -> int:
    """Draw from softmax(logits / temperature), cut to `top_k` and then `top_p`, by the request's seed."""
    params = request.params
    # From the largest down, in float64: a tiny temperature gives -inf, which is no weight, and never nan.
    logits, token_ids = logits_V.to(torch.float64).sort(descending=True, stable=True)
    logits = (logits - logits[0]) / params.temperature
    if params.top_k > 0:
        logits = logits[: params.top_k]
    weights = logits.softmax(-1)
    if params.top_p < 1:
        weights = weights[weights.cumsum(0) - weights < params.top_p]
    sums = weights.cumsum(0)
    drawn = int((sums <= uniform(request.seed, len(request.output_ids)) * sums[-1]).sum())
    return int(token_ids[drawn])


def _to_bytes(logits: torch.Tensor) -> bytes:
    return logits.contiguous().numpy().tobytes()
