"""Turns hidden states into new tokens, and into the logits and logprobs that requests ask for.

`launch` queues all of it on the device, and the host learns the tokens later, while the next step runs. Some requests
need the host first: those whose results are more than a token, and those whose next token depends on this one in a way
that only the host can tell. A step with such a request is synchronous, and says for which reason.

It does not know why a slice is cut as it is: a prompt may come in chunks, or be computed again after a preemption. A
slice yields a token if it reaches the end of its request's text. Every position of a prompt is reported once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch

from antiphon.core.batch import Batch, upload
from antiphon.engine.sampling.choice import Chooser, chunks, takes_best
from antiphon.engine.sampling.draw import likeliest
from antiphon.engine.sampling.edits import has_penalties
from antiphon.engine.sampling.new_tokens import NewTokens
from antiphon.engine.scheduling.request import NewToken, PromptPart, Request, Sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The tokens of a launched step.

    wait: blocks the host until they are known; call it once. sources: where the next step finds the new token of a
    request in `NewTokens.ids_X`; complete unless the step is synchronous. reason: why it is synchronous; "" if it is
    not. `wait` must be called before the next batch is made if there is a reason.
    """

    wait: Callable[[], Sampled]
    sources: Mapping[int, int]
    reason: str = ""


class Sampler:
    """Chooses tokens. Logits stay on the device, unless a request asks for them.

    to_logits: maps hidden states [N, D] to logits [N, V], in float32 at least. requests: the scheduler's table; the
    sampler sets `num_reported` and `sampling` of its requests. new_tokens: where steps leave their tokens; without it
    all steps are synchronous. eos_token_ids: tokens that min_tokens rules out.
    num_likeliest, most_elements and pin_memory: see `Chooser`.
    """

    def __init__(
        self,
        to_logits: Callable[[torch.Tensor], torch.Tensor],
        requests: Mapping[int, Request],
        *,
        vocab_size: int,
        new_tokens: NewTokens | None = None,
        eos_token_ids: Sequence[int] = (),
        num_likeliest: int = 1024,
        most_elements: int = 2**22,
        pin_memory: bool = False,
    ) -> None:
        self.new_tokens = new_tokens
        self._to_logits = to_logits
        self._requests = requests
        self._chooser = Chooser(
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            num_likeliest=num_likeliest,
            most_elements=most_elements,
            pin_memory=pin_memory,
        )
        self._upload = partial(upload, pin_memory=pin_memory)
        self._chunk_size = most_elements // vocab_size

    def __call__(self, hidden_TD: torch.Tensor, batch: Batch) -> Sampled:
        """Sample one step, and wait for its tokens."""
        return self.launch(hidden_TD, batch).wait()

    @torch.inference_mode()
    def launch(
        self, hidden_XD: torch.Tensor, batch: Batch, *, rows: Sequence[int] | None = None, greedy: bool = False
    ) -> Sampling:
        """Sample one step. hidden_XD: the hidden states after the last norm, in the order of the batch's tokens.

        rows: of a padded step, whose slices are single tokens: the row of each slice in hidden_XD. greedy: the step has
        already put the best token after each row of hidden_XD into `new_tokens`, at the same index.
        """
        prompt: dict[int, PromptPart] = {}
        places, requests, last_rows = [], [], []
        ends = accumulate(batch.query_lens) if rows is None else [row + 1 for row in rows]
        for place, (part, end) in enumerate(zip(batch.requests, ends, strict=True)):
            request = self._requests[part.request_id]
            if part.context_len + part.query_len == request.num_tokens:
                places.append(place)
                requests.append(request)
                last_rows.append(end - 1)
            if request.params.wants_prompt:
                results = self._prompt_part(request, hidden_XD[end - part.query_len : end], part.context_len)
                if results is not None:
                    prompt[place] = results
        reason = "prompt results" if prompt else self._why_synchronous(requests)
        if not places:
            return Sampling(wait=lambda: Sampled(prompt=prompt), sources={}, reason=reason)
        if reason:
            found = self._tokens(self._logits(hidden_XD, last_rows), requests)
            sampled = Sampled(tokens=dict(zip(places, found, strict=True)), prompt=prompt)
            return Sampling(wait=lambda: sampled, sources={}, reason=reason)
        indices = self._choose(hidden_XD, last_rows, requests, greedy=greedy)
        assert self.new_tokens is not None
        read = self.new_tokens.read(max(indices) + 1)

        def wait() -> Sampled:
            ids = read()
            tokens = {place: NewToken(token_id=ids[index]) for place, index in zip(places, indices, strict=True)}
            return Sampled(tokens=tokens)

        ids = [request.request_id for request in requests]
        return Sampling(wait=wait, sources=dict(zip(ids, indices, strict=True)))

    def _choose(
        self, hidden_XD: torch.Tensor, last_rows: list[int], requests: list[Request], *, greedy: bool
    ) -> Sequence[int]:
        """Put the tokens of all requests into `new_tokens`, and return their indices there."""
        assert self.new_tokens is not None
        if not greedy:
            ids_N = self._chooser.launch(self._logits(hidden_XD, last_rows), requests)
            self.new_tokens.ids_X[: len(requests)] = ids_N
            return range(len(requests))
        drawn = [number for number, request in enumerate(requests) if not takes_best(request)]
        if drawn:
            rows = [last_rows[number] for number in drawn]
            (rows_N,) = self._upload([torch.tensor(rows)], hidden_XD.device)
            logits_NV = self._to_logits(hidden_XD[rows_N])
            ids_N = self._chooser.launch(logits_NV, [requests[number] for number in drawn])
            self.new_tokens.ids_X.index_copy_(0, rows_N, ids_N)
        return last_rows

    def _logits(self, hidden_XD: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if rows == list(range(hidden_XD.shape[0])):
            return self._to_logits(hidden_XD)
        (rows_N,) = self._upload([torch.tensor(rows)], hidden_XD.device)
        return self._to_logits(hidden_XD[rows_N])

    def _why_synchronous(self, requests: Sequence[Request]) -> str:
        """Why the host must see the tokens of these requests before the next step; "" if it need not."""
        if self.new_tokens is None:
            return "the device does not queue its work"
        for request in requests:
            params = request.params
            if params.return_logits:
                return "logits"
            if params.logprobs is not None:
                return "logprobs"
            if has_penalties(params):
                return "penalties"
            if self._chooser.may_miss(params):
                return "top_p without top_k"
        return ""

    def _tokens(self, logits_NV: torch.Tensor, requests: Sequence[Request]) -> list[NewToken]:
        ids_N, token_ids = self._chooser.choose(logits_NV, requests)
        tokens = [NewToken(token_id=token_id) for token_id in token_ids]
        scored = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        for part in chunks(0, len(scored), self._chunk_size):
            rows = scored[part]
            (rows_N,) = self._upload([torch.tensor(rows)], logits_NV.device)
            tops = [requests[row].params.logprobs or 0 for row in rows]
            found = score_tokens(logits_NV[rows_N], ids_N[rows_N], [token_ids[row] for row in rows], tops)
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
        kept = [row for row, request in enumerate(requests) if request.params.return_logits]
        if kept:
            (rows_N,) = self._upload([torch.tensor(kept)], logits_NV.device)
            for row, logits_V in zip(kept, logits_NV[rows_N].cpu(), strict=True):
                tokens[row] = replace(tokens[row], logits=_to_bytes(logits_V))
        return tokens

    def _prompt_part(self, request: Request, hidden_SD: torch.Tensor, context_len: int) -> PromptPart | None:
        """Return the prompt results for positions of a slice that were not reported before, if it has any."""
        params, prompt_ids = request.params, request.prompt_ids
        first, last = max(context_len, request.num_reported), min(context_len + len(hidden_SD), len(prompt_ids))
        if first >= last:
            return None
        assert first == request.num_reported, f"position {request.num_reported} of the prompt was skipped for {first}"
        request.num_reported = last
        logits, logprobs = [], []
        # In chunks, because the logits of a long prompt can exceed the memory that the cache leaves free.
        for part in chunks(first, last, self._chunk_size):
            logits_SV = self._to_logits(hidden_SD[part.start - context_len : part.stop - context_len])
            next_ids = prompt_ids[part.start + 1 : part.stop + 1]
            if params.prompt_logprobs is not None and next_ids:
                (next_S,) = self._upload([torch.tensor(next_ids)], logits_SV.device)
                tops = [params.prompt_logprobs] * len(next_ids)
                logprobs += score_tokens(logits_SV[: len(next_ids)], next_S, next_ids, tops)
            if params.return_prompt_logits:
                logits.append(_to_bytes(logits_SV.cpu()))
        return PromptPart(logits=b"".join(logits) if params.return_prompt_logits else None, logprobs=logprobs)


def _to_bytes(logits: torch.Tensor) -> bytes:
    return logits.contiguous().numpy().tobytes()


def score_tokens(
    logits_NV: torch.Tensor, token_ids_N: torch.Tensor, on_host: Sequence[int], tops: Sequence[int]
) -> list[NewToken]:
    """Return one token per row, with its logprob, its rank and the `tops[row]` likeliest tokens. One copy to the host.

    token_ids_N: on the device of the logits; on_host: the same ids on the host. The logits are not modified.
    """
    logprobs_NV = logits_NV.log_softmax(-1)
    chosen_N1 = logprobs_NV.gather(1, token_ids_N.unsqueeze(-1))
    rank_N1 = (logprobs_NV > chosen_N1).sum(-1, keepdim=True) + 1
    count = min(max(tops), logits_NV.shape[1])
    # Ordered by the logits, because log-softmax can round two of them to one value.
    ids_NK = likeliest(logits_NV, count)[1]
    top_NK = logprobs_NV.gather(1, ids_NK)
    packed = torch.cat([chosen_N1.double(), rank_N1.double(), ids_NK.double(), top_NK.double()], dim=-1).tolist()
    return [
        NewToken(
            token_id=token_id,
            logprob=row[0],
            rank=int(row[1]),
            top=tuple((int(row[2 + i]), row[2 + count + i]) for i in range(min(top, count))),
        )
        for token_id, row, top in zip(on_host, packed, tops, strict=True)
    ]
