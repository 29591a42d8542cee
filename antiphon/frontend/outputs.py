"""Turns a request's tokens into text as they arrive, finds stop strings, and gathers logprobs.

A `Collector` takes the `TokenOutput`s of one request in order, and returns text that the caller can show at once. It
holds back incomplete characters, and text that could become a stop string. It knows nothing of ranks: when it sets
`must_cancel`, the caller tells them to forget the request.

    collector = Collector(tokenizer, request, logits_dtype=torch.float32)
    for output in outputs_of_the_request:
        print(collector.take(output).text, end="")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum

import torch

from antiphon.core.sampling import CompletionOutput, Logprob
from antiphon.engine.scheduling.request import NewToken, Request, TokenOutput
from antiphon.frontend.detokenizer import Detokenizer, TextBefore
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer


class StopFinder:
    """Finds stop strings in a growing text. Of several, the one that is complete first wins.

    include: whether the stop string stays in the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self.text = ""
        self.found: str | None = None
        self._stops = stops
        self._include = include
        self._num_searched = 0
        self._num_shown = 0

    def add(self, new: str, *, search: bool, last: bool) -> str:
        """Take more text and return what can be shown; once a stop string is found, all that is left to show.

        search: whether a stop string that is completed now counts. last: whether the text ends here.
        """
        self.text += new
        if search and new:
            self._search()
        self._num_searched = len(self.text)
        held = 0 if last or self.found is not None or self._include else self._num_undecided()
        shown = self.text[self._num_shown : len(self.text) - held]
        self._num_shown += len(shown)
        return shown

    def end_with(self, stop: str) -> str:
        """End the text at a special token that is a stop string. Returns all that is left to show."""
        self.found = stop
        if self._include:
            self.text += stop
        shown = self.text[self._num_shown :]
        self._num_shown = len(self.text)
        return shown

    def _search(self) -> None:
        matches = []
        for stop in self._stops:
            start = self.text.find(stop, max(0, self._num_searched - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if matches:
            end, start, self.found = min(matches)
            self.text = self.text[: end if self._include else start]

    def _num_undecided(self) -> int:
        """The number of characters at the end of the text that could begin a stop string."""
        for length in range(min(len(self.text), max(map(len, self._stops), default=1) - 1), 0, -1):
            ending = self.text[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens and new text of one request. One may be empty when the other is not."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Collector:
    """Collects the output of one request. before: what the decoding of its text depends on in the prompt.

    logits_dtype: the dtype of the bytes in `NewToken.logits`. streaming: decode the text piece by piece. Otherwise, if
    there are no stop strings, it is decoded once, at the end. The text of `completion` is decoded as a whole, following
    the prompt. The texts of the deltas add up to it with every tokenizer that decodes from left to right.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | NoTokenizer,
        request: Request,
        *,
        logits_dtype: torch.dtype = torch.float32,
        streaming: bool = True,
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.must_cancel = False  # a stop string has ended it, which the ranks do not know yet
        self.num_cached = 0
        self._tokenizer = tokenizer
        self._prompt_ids = request.prompt_ids
        self._params = request.params
        self._logits_dtype = logits_dtype
        self._piecewise = streaming or bool(request.params.stops)
        self._skip_special = request.params.skip_special_tokens
        self.before = TextBefore.of(tokenizer, request.prompt_ids, skip_special=self._skip_special)
        self._detokenizer = Detokenizer(tokenizer, before=self.before, skip_special=self._skip_special)
        # Skipped special tokens have no text, so their stop strings are found by id.
        special = {tokenizer.special_id(stop): stop for stop in request.params.stops} if self._skip_special else {}
        self._special_stops = {token_id: stop for token_id, stop in special.items() if token_id is not None}
        self._finder = StopFinder(request.params.stops, include=request.params.include_stop_str_in_output)
        self._tokens: list[NewToken] = []
        self._prompt_tokens: list[NewToken] = []
        self._prompt_logits: list[bytes] = []
        self._text = ""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def take(self, output: TokenOutput) -> Delta:
        """Take the next output of this request. Outputs after its end are ignored."""
        if self.finished:
            return Delta()
        self.num_cached = output.num_cached
        if output.prompt is not None:
            self._prompt_tokens += output.prompt.logprobs
            if output.prompt.logits is not None:
                self._prompt_logits.append(output.prompt.logits)
        token = output.token
        if token is None:
            return Delta()
        self.token_ids.append(token.token_id)
        self._tokens.append(token)
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        text = self._take_text(token.token_id) if self._piecewise else ""
        if self.finish_reason is not None and self._finder.found is None:
            self._text = self._whole_text()
        return Delta(
            text=text,
            token_ids=[token.token_id],
            logprobs=None if self._params.logprobs is None else [self._logprobs(token)],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def completion(self, index: int = 0) -> CompletionOutput:
        """Return the result of a request that has finished."""
        assert self.finish_reason is not None, "the request has not finished"
        params, tokens = self._params, self._tokens
        return CompletionOutput(
            index=index,
            text=self._text,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if params.logprobs is None else [self._logprobs(token) for token in tokens],
            cumulative_logprob=None if params.logprobs is None else fsum(token.logprob or 0.0 for token in tokens),
            logits=self._logits([t.logits or b"" for t in tokens], len(tokens)) if params.return_logits else None,
        )

    def prompt_logits(self) -> torch.Tensor | None:
        """The logits [len(prompt_ids), V] of the prompt, on the CPU, if requested."""
        return self._logits(self._prompt_logits, len(self._prompt_ids)) if self._params.return_prompt_logits else None

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """The logprobs of the prompt's tokens, if requested. The first token has none."""
        if self._params.prompt_logprobs is None:
            return None
        return [None, *(self._logprobs(token) for token in self._prompt_tokens)]

    def _take_text(self, token_id: int) -> str:
        """Return the new text to show. Records the end if a stop string is found."""
        is_text = len(self._ids_of_text()) == len(self.token_ids)
        new = self._detokenizer.add(token_id) if is_text else ""
        may_stop = len(self.token_ids) > self._params.min_tokens
        stop = self._special_stops.get(token_id) if is_text and may_stop else None
        if self.finished or stop is not None:
            new += self._detokenizer.flush()
        shown = self._finder.add(new, search=may_stop, last=self.finished)
        if stop is not None and self._finder.found is None:
            shown += self._finder.end_with(stop)
        if self._finder.found is not None:
            self.must_cancel = not self.finished
            self.finish_reason, self.stop_reason = "stop", self._finder.found
            self._text = self._finder.text
        return shown

    def _whole_text(self) -> str:
        before = self.before
        ids = [*before.ids, *self._ids_of_text()]
        text = self._tokenizer.decode(ids, continues=before.continues, skip_special=self._skip_special)
        return text[len(before.text) :]

    def _ids_of_text(self) -> list[int]:
        """All tokens, without the one that has ended the text."""
        ended_by_token = self.finish_reason == "stop" and not self._params.include_stop_str_in_output
        return self.token_ids[:-1] if ended_by_token else self.token_ids

    def _logprobs(self, token: NewToken) -> dict[int, Logprob]:
        """The logprob of the token itself, then those of the likeliest tokens."""
        assert token.logprob is not None
        found = {token.token_id: self._logprob(token.token_id, token.logprob, token.rank)}
        rank, last = 0, None
        for place, (token_id, logprob) in enumerate(token.top, start=1):
            rank, last = (rank if logprob == last else place), logprob
            found.setdefault(token_id, self._logprob(token_id, logprob, rank))
        return found

    def _logprob(self, token_id: int, logprob: float, rank: int | None) -> Logprob:
        return Logprob(logprob=logprob, rank=rank, decoded_token=self._tokenizer.token_text(token_id))

    def _logits(self, parts: list[bytes], num_rows: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=self._logits_dtype).view(num_rows, -1)
