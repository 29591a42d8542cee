"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from antiphon.core.sampling import CompletionOutput, SamplingParams
from antiphon.frontend.detokenizer import TextBefore, whole_characters
from antiphon.frontend.open_request import OpenRequest, StreamItem
from antiphon.frontend.outputs import Delta
from antiphon.server.errors import ApiError
from antiphon.server.jobs import Job
from antiphon.server.logprobs import Place, TextPlaces, completion_logprobs
from antiphon.server.protocol import CompletionRequest
from antiphon.server.service import Service


class CompletionJob(Job):
    """Completions. With echo, text and logprobs begin with the prompt, and max_tokens may be 0."""

    prompt_field = "prompt"
    id_prefix = "cmpl"
    object_whole = object_chunk = "text_completion"
    request: CompletionRequest

    def __init__(self, request: CompletionRequest, service: Service) -> None:
        self._echo_only = request.echo and request.max_tokens == 0  # one token is generated, but not shown
        super().__init__(request, service)
        self._text_places: dict[int, TextPlaces] = {}  # by choice: where its next token begins
        self._of_prompt: dict[int, Sequence[Place]] = {}  # by prompt: its logprobs, computed once for all n results
        self._held: dict[int, list[StreamItem]] = {}  # by prompt: pieces that wait until its first result has begun

    @property
    def num_prompts(self) -> int:
        return len(self.request.prompt)

    def make_params(self) -> SamplingParams:
        request = self.request
        if request.best_of is not None and request.best_of != request.n:
            fact, remedy = f"best_of={request.best_of} is not supported", "leave it out, or set it to n"
            raise ApiError(400, fact, remedy=remedy, option="best_of", value=request.best_of)
        changes: dict[str, Any] = {"logprobs": request.logprobs}
        if request.echo and request.logprobs is not None:
            changes["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
        if self._echo_only:
            changes |= {"max_tokens": 1, "min_tokens": 0}
        return request.sampling_params(**changes)

    async def prompts(self) -> list[list[int]]:
        request = self.request
        num_characters = sum(len(prompt) for prompt in request.prompt if isinstance(prompt, str))
        return [
            await self.service.encode(
                prompt, add_special_tokens=request.add_special_tokens, place=place, num_characters=num_characters
            )
            if isinstance(prompt, str)
            else prompt
            for place, prompt in enumerate(request.prompt)
        ]

    def num_generated(self, opened: OpenRequest) -> int:
        return 0 if self._echo_only else opened.num_tokens

    def choice(self, place: int, opened: OpenRequest, index: int, done: CompletionOutput) -> dict[str, Any]:
        choice = self._choice(place, opened, index, done)
        if self.request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_places(place, opened)
        return choice

    def pieces(self, place: int, opened: OpenRequest, item: StreamItem) -> Iterable[dict[str, Any]]:
        if not item.delta.token_ids:
            return
        # The first result carries the prompt's logprobs; the others wait for it.
        if self.request.echo and item.index and not opened.collectors[0].token_ids:
            self._held.setdefault(place, []).append(item)
            return
        for one in [item, *self._held.pop(place, [])]:
            delta = one.delta
            first = place * self.params.n + one.index not in self._text_places
            choice = self._choice(place, opened, one.index, delta)
            if first or delta.text or delta.finish_reason or self.request.logprobs is not None or "token_ids" in choice:
                yield choice

    def _choice(self, place: int, opened: OpenRequest, number: int, delta: Delta | CompletionOutput) -> dict[str, Any]:
        """The choice for a piece of result `number`, or for all of it."""
        request = self.request
        if self._echo_only:
            delta = replace(
                delta,
                text="",
                token_ids=[],
                logprobs=None if delta.logprobs is None else [],
                finish_reason="length",
                stop_reason=None,
            )
        index = place * self.params.n + number
        first = index not in self._text_places
        text, token_ids = delta.text, delta.token_ids
        places: Sequence[Place] | None = delta.logprobs
        if first:
            needs_prompt = request.echo or request.logprobs is not None
            prompt_text = self._prompt_text(place, opened) if needs_prompt else ""
            self._text_places[index] = self._places_of(opened, 0 if request.echo else len(prompt_text))
        if first and request.echo:
            text = prompt_text + text
            if places is not None:
                token_ids = [*opened.prompt_ids, *token_ids]
                places = [*self._prompt_places(place, opened), *places]
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if places is not None:
            choice["logprobs"] = completion_logprobs(
                places,
                token_ids,
                num_top=request.logprobs or 0,
                tokenizer=self.service.tokenizer,
                text_places=self._text_places[index],
                as_ids=request.return_tokens_as_token_ids,
            )
        if request.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = opened.prompt_ids
        return choice

    def is_large_piece(self, place: int, opened: OpenRequest, item: StreamItem) -> bool:
        """With echo, the first piece of each result carries the logprobs of the prompt, which may be long."""
        first = place * self.params.n + item.index not in self._text_places
        return first and self.params.prompt_logprobs is not None and self.is_many(len(opened.prompt_ids))

    def _prompt_places(self, place: int, opened: OpenRequest) -> Sequence[Place]:
        if place not in self._of_prompt:
            self._of_prompt[place] = opened.collectors[0].prompt_logprobs() or []
        return self._of_prompt[place]

    def _prompt_text(self, place: int, opened: OpenRequest) -> str:
        """The text that the output continues. A character that the prompt leaves incomplete belongs to the output."""
        prompt, tokenizer, skips = self.request.prompt[place], self.service.tokenizer, self.request.skip_special_tokens
        if isinstance(prompt, str) and skips:
            return prompt
        if self._echo_only:
            return tokenizer.decode(opened.prompt_ids, skip_special=skips)
        return whole_characters(tokenizer, opened.prompt_ids, skip_special=skips)

    def _places_of(self, opened: OpenRequest, start: int) -> TextPlaces:
        before = TextBefore() if self.request.echo else opened.collectors[0].before
        skips = self.request.skip_special_tokens
        return TextPlaces(self.service.tokenizer, start=start, before=before, skip_special=skips)
