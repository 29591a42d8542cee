"""What completions and chats share: what a request asks of the engine, and how its answer is written.

A job runs nothing. `generation` opens its prompts, and passes it the results as they arrive.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from antiphon.core.errors import OptionError, RequestError
from antiphon.core.sampling import CompletionOutput, SamplingParams
from antiphon.frontend.open_request import OpenRequest, StreamItem
from antiphon.server.errors import ApiError, refusal, to_json
from antiphon.server.protocol import SamplingFields
from antiphon.server.service import Service

_MANY_LOGPROBS = 2000


class Job(ABC):
    """Created from a checked body. Raises `ApiError` for parameters that contradict each other or are out of range."""

    prompt_field = ""
    id_prefix = ""
    object_whole = ""
    object_chunk = ""

    def __init__(self, request: SamplingFields, service: Service) -> None:
        service.check_model(request.model)
        self.request = request
        self.service = service
        self.stream = request.stream
        self.include_usage = request.stream_options is not None and request.stream_options.include_usage
        self.fields = frozenset(type(request).model_fields)
        if request.stream_options is not None and not request.stream:
            remedy = "set stream, or leave stream_options out"
            raise ApiError(400, "stream_options needs stream=true", remedy=remedy, option="stream_options")
        try:
            self.params = self.make_params()
        except OptionError as error:
            raise self.refusal(error) from None
        if self.stream and request.prompt_logprobs is not None:
            fact = "prompt_logprobs is not supported with stream=true"
            raise ApiError(400, fact, remedy="leave one out", option="prompt_logprobs")
        self.has_logprobs = self.params.logprobs is not None or self.params.prompt_logprobs is not None
        if self.has_logprobs and not service.engine.tokenizer.has_text:
            fact, limit = "logprobs are not available", "with dummy weights there is no tokenizer to name the tokens"
            raise ApiError(400, fact, limit=limit, remedy="leave logprobs out", option="logprobs")
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.object_chunk if self.stream else self.object_whole,
            "created": int(time.time()),
            "model": request.model or service.model_name,
        }
        self._chunk_start = b"data: " + to_json(self._head)[:-1] + b',"choices":['
        self._chunk_end = b'],"usage":null}\n\n' if self.include_usage else b"]}\n\n"

    @property
    @abstractmethod
    def num_prompts(self) -> int: ...

    @property
    def num_results(self) -> int:
        return self.num_prompts * self.params.n

    @abstractmethod
    def make_params(self) -> SamplingParams:
        """How to sample. Raises `OptionError` or `ApiError`."""

    @abstractmethod
    async def prompts(self) -> list[list[int]]:
        """The token ids of every prompt. Raises `RequestError`."""

    @abstractmethod
    def choice(self, place: int, opened: OpenRequest, index: int, done: CompletionOutput) -> dict[str, Any]:
        """The choice for finished result `index` of prompt `place`."""

    @abstractmethod
    def pieces(self, place: int, opened: OpenRequest, item: StreamItem) -> Iterable[dict[str, Any]]:
        """The choices to stream for one more piece of a result of prompt `place`."""

    def choices(self, place: int, opened: OpenRequest) -> list[dict[str, Any]]:
        """The choices of a prompt whose results have all finished."""
        results = enumerate(opened.collectors)
        return [self.choice(place, opened, index, collector.completion(index)) for index, collector in results]

    def num_generated(self, opened: OpenRequest) -> int:
        """The number of generated tokens that the client gets."""
        return opened.num_tokens

    def extras(self, opened: Sequence[OpenRequest]) -> dict[str, Any]:
        """Further fields of a whole answer."""
        return {}

    def whole(self, opened: Sequence[OpenRequest]) -> bytes:
        """The answer, once all results have finished."""
        choices = [choice for place, one in enumerate(opened) for choice in self.choices(place, one)]
        return to_json(self._head | {"choices": choices, "usage": self._usage(opened)} | self.extras(opened))

    def is_large(self, opened: Sequence[OpenRequest]) -> bool:
        """Whether the whole answer takes long to encode."""
        num_tokens = sum(len(one.prompt_ids) + one.num_tokens for one in opened)
        return self.has_logprobs and self.is_many(self.params.n * num_tokens)

    def is_many(self, num_places: int) -> bool:
        """Whether the logprobs of this many tokens take long to encode."""
        return num_places * (1 + max(self.params.logprobs or 0, self.params.prompt_logprobs or 0)) > _MANY_LOGPROBS

    def is_large_piece(self, place: int, opened: OpenRequest, item: StreamItem) -> bool:
        """Whether the next pieces take long to encode."""
        return False

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """One event of a stream."""
        return self._chunk_start + to_json(choice) + self._chunk_end

    def last_chunks(self, opened: Sequence[OpenRequest]) -> bytes:
        """The end of a stream."""
        end = b"data: [DONE]\n\n"
        if not self.include_usage:
            return end
        return b"data: " + to_json(self._head | {"choices": [], "usage": self._usage(opened)}) + b"\n\n" + end

    def refusal(self, error: OptionError | RequestError) -> ApiError:
        return refusal(error, self.fields, prompt_field=self.prompt_field)

    def _usage(self, opened: Sequence[OpenRequest]) -> dict[str, Any]:
        num_prompt = sum(len(one.prompt_ids) for one in opened)
        num_generated = sum(self.num_generated(one) for one in opened)
        num_cached = sum(one.collectors[0].num_cached for one in opened)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
