"""One streamed request to an OpenAI-compatible server, and when its tokens came.

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

from antiphon.bench.serve_workload import Ask

__all__ = ["Answered", "Target", "ask_server", "request_body"]

_TOLD = 300  # characters of an answer that are kept of an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server's endpoint and what every request says. `extra` goes into every body as it is."""

    url: str
    model: str
    is_chat: bool = False
    ignore_eos: bool = False
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Answered:
    """What became of a request. Times in seconds; `start_s` and `end_s` by `time.perf_counter`.

    late_s: how much later than planned it was sent. num_input, num_output: tokens, as the server counts them; without
    its count the ids sent (0 for texts) and the chunks received. error: empty if it was answered to its end.
    """

    start_s: float = 0.0
    end_s: float = 0.0
    late_s: float = 0.0
    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_input: int = 0
    num_output: int = 0
    text: str = ""
    error: str = ""

    @property
    def latency_s(self) -> float:
        return self.end_s - self.start_s


def request_body(ask: Ask, target: Target) -> dict[str, Any]:
    """What is sent. Raises nothing; a chat of token ids is the caller's to avoid."""
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
    """Send it and read the stream to its end. Whatever goes wrong is in `error`."""
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
                found.error = f"HTTP {response.status_code}: {told[:_TOLD]}"
            else:
                async for line in response.aiter_lines():
                    reading.take(line)
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
    """Reads the lines of one stream of events into an `Answered`."""

    def __init__(self, found: Answered, is_chat: bool, keep_text: bool) -> None:
        self._found = found
        self._is_chat = is_chat
        self._keep_text = keep_text
        self._last_s = 0.0
        self._done = self._counted = False
        self._num_chunks = 0

    def take(self, line: str) -> None:
        if not line.startswith("data:"):
            return
        now = time.perf_counter()
        data = line[5:].strip()
        if data == "[DONE]":
            self._done = True
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError("an event is no object")
        if event.get("error"):
            self._found.error = f"an event of the stream: {str(event['error'])[:_TOLD]}"
            return
        if event.get("choices"):
            self._token(event["choices"][0], now)
        if usage := event.get("usage"):
            self._counted = True
            self._found.num_input = usage.get("prompt_tokens") or self._found.num_input
            self._found.num_output = usage.get("completion_tokens") or 0

    def _token(self, choice: dict[str, Any], now: float) -> None:
        found = self._found
        text = (choice.get("delta") or {}).get("content") if self._is_chat else choice.get("text")
        # A chat begins with a chunk that names the role, perhaps before any token. A chunk without text may be a token
        # in a completion: a part of a character, or of dummy weights.
        if self._is_chat and not text and choice.get("finish_reason") is None:
            return
        closing = not text and choice.get("finish_reason") is not None and self._num_chunks > 0
        if not closing:
            if self._num_chunks == 0:
                found.first_s = now - found.start_s
            else:
                found.gaps_s.append(now - self._last_s)
            self._last_s = now
            self._num_chunks += 1
        if self._keep_text and text:
            found.text += text
        found.end_s = now

    def what_is_missing(self) -> str:
        """Empty for a stream that came to its end."""
        if not self._num_chunks:
            return "the stream has ended without a token"
        if not self._done:
            return "the stream has ended without [DONE]"
        if not self._counted:
            self._found.num_output = self._num_chunks
        return ""
