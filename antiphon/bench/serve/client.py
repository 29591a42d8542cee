"""One streamed request to an OpenAI-compatible server, and the times at which its tokens arrived.

send ──► first chunk ──► chunk ──► ... ──► [DONE]
  └─ first_s ─┘└─ gaps_s ─┘
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from antiphon.bench.serve.event_stream import EventStream
from antiphon.bench.serve.workload import Ask

_MOST_ERROR = 300  # characters of an error response that are kept
_PIECES = ("content", "reasoning", "reasoning_content", "refusal", "tool_calls", "function_call")
"""The fields of a chat chunk that carry tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server's endpoint and the fields of every request. extra: further fields of every body."""

    url: str
    model: str
    is_chat: bool = False
    ignore_eos: bool = False
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Answered:
    """The outcome of a request. Times in seconds; `start_s`, `last_s` (of tokens) and `end_s` by `time.perf_counter`.

    late_s: how much later than planned it was sent. num_input, num_output: tokens as the server counts them; if it does
    not, the number of ids sent (0 for text) and of chunks received. text, reasoning: the answer and, in a chat, the
    model's reasoning before it; empty unless kept. error: empty if the answer is complete.
    """

    start_s: float = 0.0
    end_s: float = 0.0
    late_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_input: int = 0
    num_output: int = 0
    text: str = ""
    reasoning: str = ""
    error: str = ""

    def saw_tokens(self, now: float) -> None:
        """Record the arrival of tokens: the time of the first ones, or the gap before more."""
        if not self.last_s:
            self.first_s = now - self.start_s
        else:
            self.gaps_s.append(now - self.last_s)
        self.last_s = now

    @property
    def latency_s(self) -> float:
        return self.end_s - self.start_s


def request_body(ask: Ask, target: Target) -> dict[str, Any]:
    """The body to send. The caller must not pass token ids for a chat."""
    body: dict[str, Any] = {
        "model": target.model,
        "temperature": target.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.is_chat:
        body |= {"messages": [{"role": "user", "content": ask.prompt}], "max_completion_tokens": ask.max_tokens}
    else:
        body |= {"prompt": ask.prompt, "max_tokens": ask.max_tokens}
    if target.ignore_eos:
        body["ignore_eos"] = True
    return body | dict(target.extra)


async def ask_server(client: httpx.AsyncClient, ask: Ask, target: Target, *, keep_text: bool = False) -> Answered:
    """Send a request and read the stream to its end. A failure is reported in `error`."""
    found = Answered(num_input=len(ask.prompt) if isinstance(ask.prompt, list) else 0)
    reading = _Reading(found, target.is_chat, keep_text)
    content = json.dumps(request_body(ask, target)).encode()
    found.start_s = time.perf_counter()
    try:
        async with client.stream(
            "POST", target.url, content=content, headers={"Content-Type": "application/json"}
        ) as response:
            if response.status_code != httpx.codes.OK:
                told = (await response.aread()).decode(errors="replace")
                found.error = f"HTTP {response.status_code}: {told[:_MOST_ERROR]}"
            else:
                async for part in response.aiter_bytes():
                    reading.take(part)
                reading.end()
    except httpx.HTTPError as error:
        found.error = found.error or f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found.error = f"the stream cannot be read: {type(error).__name__}: {error}"
    if not found.end_s:
        found.end_s = time.perf_counter()
    if not found.error:
        found.error = reading.what_is_missing()
    return found


class _Reading:
    """Reads the bytes of one stream of events into an `Answered`."""

    def __init__(self, found: Answered, is_chat: bool, keep_text: bool) -> None:
        self._found = found
        self._is_chat = is_chat
        self._keep_text = keep_text
        self._stream = EventStream()
        self._done = self._counted = False
        self._num_chunks = 0

    def take(self, part: bytes) -> None:
        """Process the bytes that have just arrived."""
        now = time.perf_counter()
        for data in self._stream.feed(part):
            self._event(data.strip(), now)

    def end(self) -> None:
        """End the stream. Some servers send no blank line after the final [DONE]."""
        if self._stream.unfinished().strip() == "[DONE]":
            self._done = True

    def _event(self, data: str, now: float) -> None:
        if data == "[DONE]":
            self._done = True
        if data in ("", "[DONE]"):
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError("an event is not an object")
        if event.get("error"):
            self._found.error = f"an event of the stream: {str(event['error'])[:_MOST_ERROR]}"
            return
        if event.get("choices"):
            self._choice(event["choices"][0], now)
        if usage := event.get("usage"):
            self._counted = True
            self._found.num_input = usage.get("prompt_tokens") or self._found.num_input
            self._found.num_output = usage.get("completion_tokens") or 0

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        # A chat starts with a chunk that names the role, maybe before any token. In a completion a chunk without text
        # may be a token: part of a character, or a token without text from dummy weights.
        piece: dict[str, Any] = (choice.get("delta") or {}) if self._is_chat else {"content": choice.get("text")}
        has_tokens = any(piece.get(name) for name in _PIECES)
        ends = bool(choice.get("finish_reason"))
        if self._is_chat and not has_tokens and not ends:
            return
        closing = ends and not has_tokens and self._num_chunks > 0
        if not closing:
            self._found.saw_tokens(now)
            self._num_chunks += 1
        if self._keep_text:
            self._found.text += piece.get("content") or ""
            # Servers use one name or the other; some send both, with the same text.
            self._found.reasoning += piece.get("reasoning") or piece.get("reasoning_content") or ""
        self._found.end_s = now

    def what_is_missing(self) -> str:
        """What is missing at the end of a stream; "" if nothing."""
        if not self._num_chunks:
            return "the stream has ended without a token"
        if not self._done:
            return "the stream has ended without [DONE]"
        if not self._counted:
            self._found.num_output = self._num_chunks
        return ""
