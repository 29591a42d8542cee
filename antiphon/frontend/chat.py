"""The messages of a chat, as callers write them and as chat templates take them. Offline and in the server alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from antiphon.core.errors import RequestError, unicode_fault

Message = Mapping[str, Any]
"""`role` and `content`, a text or parts of type text; what else is there is the template's to use."""

_TEXT_TYPES = ("text", "input_text")


def joined_text(content: object) -> str:
    """A text, or the texts of parts, joined. Raises `ValueError` for anything else, in words about `content`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise ValueError("content is not text; use a text, or a list of parts of type text")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError('content has a part without a type; use {"type": "text", "text": "..."}')
        if part["type"] not in _TEXT_TYPES:
            raise ValueError(f"content has a part of type {part['type']!r}, which is not supported; use type text")
        said = {name for name, value in part.items() if value is not None}
        if not isinstance(part.get("text"), str) or not said <= {"type", "text"}:
            raise ValueError('content has a part of type text that is not {"type": "text", "text": "..."}')
        texts.append(part["text"])
    return "".join(texts)


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As templates take them: contents are texts, and the role developer, which templates do not know, is system.

    Raises `RequestError` for what is no list of messages.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError('messages is not a list of messages; use [{"role": "user", "content": "..."}]')
    return [_template_message(place, message) for place, message in enumerate(messages)]


def _template_message(place: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f'messages.{place} has no role; use {{"role": "user", "content": "..."}}')
    role, content = message["role"], message.get("content")
    try:
        text = "" if content is None and role == "assistant" else joined_text(content)
    except ValueError as error:
        raise RequestError(f"messages.{place}.{error}") from None
    if fault := unicode_fault(text):
        raise RequestError(f"messages.{place}.content is not valid Unicode text ({fault}); repair it")
    return {**message, "role": "system" if role == "developer" else role, "content": text}
