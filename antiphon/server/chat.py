"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from antiphon.core.errors import out_of_range
from antiphon.core.sampling import CompletionOutput, SamplingParams
from antiphon.frontend.open_request import OpenRequest, StreamItem
from antiphon.server.errors import ApiError
from antiphon.server.jobs import Job
from antiphon.server.logprobs import chat_logprobs
from antiphon.server.protocol import ChatRequest
from antiphon.server.reasoning import ReasoningSplitter, SplitOutput
from antiphon.server.service import Service

_LONGEST_TAG = 32
"""How many tokens at the end of a prompt are searched for a tag that opens the reasoning."""


class ChatJob(Job):
    """A chat. Without max_tokens, the answer may fill the model's length."""

    prompt_field = "messages"
    id_prefix = "chatcmpl"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"
    request: ChatRequest
    num_prompts = 1

    def __init__(self, request: ChatRequest, service: Service) -> None:
        if not request.messages:
            raise ApiError(400, "messages is empty", remedy="send at least one message", option="messages")
        super().__init__(request, service)
        if not request.include_reasoning and service.reasoning is None:
            raise ApiError(
                400,
                "include_reasoning=false needs a server with --reasoning-parser",
                remedy="leave it out",
                option="include_reasoning",
                value=False,
                code="unsupported_parameter",
            )
        self._begun: set[int] = set()
        self._splitters: dict[int, ReasoningSplitter] = {}  # by result, when streaming

    def make_params(self) -> SamplingParams:
        request = self.request
        if request.top_logprobs is not None and not request.logprobs:
            remedy = "set logprobs, or leave top_logprobs out"
            raise ApiError(400, "top_logprobs needs logprobs=true", remedy=remedy, option="top_logprobs")
        num_asked = request.max_completion_tokens
        if num_asked is not None and request.max_tokens not in (None, num_asked):
            fact = f"max_tokens={request.max_tokens} and max_completion_tokens={num_asked} differ"
            raise ApiError(400, fact, remedy="leave one out", option="max_completion_tokens", value=num_asked)
        if num_asked is not None and num_asked < 1:
            raise out_of_range("max_completion_tokens", num_asked, "an integer of at least 1")
        if request.top_logprobs is not None and not 0 <= request.top_logprobs <= 20:
            raise out_of_range("top_logprobs", request.top_logprobs, "an integer from 0 to 20")
        return request.sampling_params(
            max_tokens=request.max_tokens if num_asked is None else num_asked,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )

    async def prompts(self) -> list[list[int]]:
        return [await self.service.encode_chat(self.request.messages, self.request)]

    def choice(self, place: int, opened: OpenRequest, index: int, done: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant"} | self._parts(done.text, opened) | {"refusal": None},
            "logprobs": self._logprobs(done.logprobs, done.token_ids),
            "finish_reason": done.finish_reason,
            "stop_reason": done.stop_reason,
        }
        if self.request.return_token_ids:
            choice["token_ids"] = done.token_ids
        return choice

    def extras(self, opened: Sequence[OpenRequest]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.request.prompt_logprobs is not None:
            found["prompt_logprobs"] = opened[0].collectors[0].prompt_logprobs()
        if self.request.return_token_ids:
            found["prompt_token_ids"] = list(opened[0].prompt_ids)
        return found

    def pieces(self, place: int, opened: OpenRequest, item: StreamItem) -> Iterable[dict[str, Any]]:
        delta = item.delta
        if not delta.token_ids:
            return
        if item.index not in self._begun:
            self._begun.add(item.index)
            first = self._piece(item.index, {"role": "assistant", "content": "", "refusal": None})
            if self.request.return_token_ids:
                first["prompt_token_ids"] = list(opened.prompt_ids)
            yield first
        *earlier, parts = self._deltas(opened, item)
        for one in earlier:
            yield self._piece(item.index, one)
        if parts or delta.logprobs is not None or self.request.return_token_ids:
            piece = self._piece(item.index, parts or {"content": ""})
            piece["logprobs"] = self._logprobs(delta.logprobs, delta.token_ids)
            if self.request.return_token_ids:
                piece["token_ids"] = delta.token_ids
            yield piece
        if delta.finish_reason is not None:
            yield self._piece(item.index, {}) | {
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }

    def _parts(self, text: str, opened: OpenRequest) -> dict[str, str]:
        """The fields of a whole message that hold its text."""
        if self.service.reasoning is None:
            return {"content": text}
        said = self._splitter(opened).add(text, last=True)
        parts = {"content": said.content}
        if self._shows_reasoning(said):
            parts["reasoning_content"] = said.reasoning
        return parts

    def _deltas(self, opened: OpenRequest, item: StreamItem) -> list[dict[str, str]]:
        """The deltas for one piece of a result: two where the answer follows the reasoning. The last may be empty."""
        text, last = item.delta.text, item.delta.finish_reason is not None
        if self.service.reasoning is None:
            return [{"content": text} if text else {}]
        if item.index not in self._splitters:
            self._splitters[item.index] = self._splitter(opened)
        said = self._splitters[item.index].add(text, last=last)
        parts = [{"reasoning_content": said.reasoning}] if self._shows_reasoning(said) else []
        if said.content:
            parts.append({"content": said.content})
        return parts or [{}]

    def _splitter(self, opened: OpenRequest) -> ReasoningSplitter:
        tags = self.service.reasoning
        assert tags is not None
        inside = self.request.continue_final_message and tags.is_open(self.request.messages[-1].content)
        if not inside:  # the template may open the reasoning at the end of the prompt
            ending = self.service.tokenizer.decode(opened.prompt_ids[-_LONGEST_TAG:], skip_special=False)
            inside = ending.rstrip().endswith(tags.start)
        return ReasoningSplitter(tags, inside=inside)

    def _shows_reasoning(self, said: SplitOutput) -> bool:
        return bool(said.reasoning) and self.request.include_reasoning

    @staticmethod
    def _piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, places: Any, token_ids: Sequence[int]) -> dict[str, Any] | None:
        if places is None:
            return None
        return chat_logprobs(
            places,
            token_ids,
            num_top=self.request.top_logprobs or 0,
            tokenizer=self.service.tokenizer,
            as_ids=self.request.return_tokens_as_token_ids,
        )
