"""Turns the messages of a chat, as callers write them, into those that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from antiphon.core.errors import RequestError, UnsupportedError, unicode_fault

Message = Mapping[str, Any]
"""Has a `role`, and a `content` that is a text or a list of text parts. Other keys are passed to the template."""

_TEXT_TYPES = ("text", "input_text")
_EXAMPLE = '[{"role": "user", "content": "..."}]'
_PART = '{"type": "text", "text": "..."}'


def joined_text(content: object, where: str = "content") -> str:
    """Join the text parts of a content; a text stays as it is. where: the name of the content in errors.

    Raises `RequestError` for anything else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise _wrong(where, f"{where} is not a text", "use a text, or a list of parts of type text")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _wrong(where, f"{where} has a part without a type", f"use {_PART}")
        if part["type"] not in _TEXT_TYPES:
            fact = f"{where} has a part of type {part['type']!r}, which is not supported"
            raise UnsupportedError(fact, remedy="use parts of type text", option=where, value=part["type"])
        given = {name for name, value in part.items() if value is not None}
        if not isinstance(part.get("text"), str) or not given <= {"type", "text"}:
            raise _wrong(where, f"{where} has a text part without text or with other keys", f"use {_PART}")
        texts.append(part["text"])
    return "".join(texts)


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages for a template: contents become texts, and the role `developer` becomes `system`.

    Raises `RequestError` for anything but a list of messages.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise _wrong("messages", "messages is not a list of messages", f"use {_EXAMPLE}")
    return [_template_message(place, message) for place, message in enumerate(messages)]


def _template_message(place: int, message: Message) -> dict[str, Any]:
    where = f"messages.{place}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise _wrong(where, f"{where} has no role", f"use {_EXAMPLE[1:-1]}")
    role, content = message["role"], message.get("content")
    text = "" if content is None and role == "assistant" else joined_text(content, f"{where}.content")
    if fault := unicode_fault(text):
        raise RequestError(f"{where}.content is not valid Unicode", limit=fault, option=f"{where}.content")
    return {**message, "role": "system" if role == "developer" else role, "content": text}


def _wrong(where: str, fact: str, remedy: str) -> RequestError:
    return RequestError(fact, remedy=remedy, option=where)
