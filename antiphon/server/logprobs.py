"""Logprobs as JSON, in OpenAI's two shapes: for completions and for chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from antiphon.core.sampling import Logprob
from antiphon.frontend.detokenizer import Detokenizer, TextBefore
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer

Place = dict[int, Logprob] | None
"""The logprobs at one position: the actual token first, then the likeliest. `None` for a prompt's first token.

As JSON it is vLLM's shape for the logprobs of prompts.
"""


def _name(token_id: int, text: str, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else text


class TextPlaces:
    """Finds where each token begins in the text of all tokens. It takes them one by one.

    A token that is part of a character begins where the character does. A token without text takes no room.

    start: the place of the first token. before: the text that precedes it.
    """

    def __init__(
        self, tokenizer: Tokenizer | NoTokenizer, *, start: int, before: TextBefore, skip_special: bool = True
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, before=before, skip_special=skip_special)
        self._next = start

    def add(self, token_id: int) -> int:
        """Take one more token, and return its place."""
        place = self._next
        self._next += len(self._detokenizer.add(token_id))
        return place


def completion_logprobs(
    places: Sequence[Place],
    token_ids: Sequence[int],
    *,
    num_top: int,
    tokenizer: Tokenizer | NoTokenizer,
    text_places: TextPlaces,
    as_ids: bool = False,
) -> dict[str, Any]:
    """The logprobs of a completion. places: one per token of `token_ids`, the next tokens for `text_places`."""
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    offsets = []
    for token_id, place in zip(token_ids, places, strict=True):
        offsets.append(text_places.add(token_id))
        tokens.append(_name(token_id, tokenizer.token_text(token_id), as_ids))
        if place is None:
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        token_logprobs.append(place[token_id].logprob)
        top: dict[str, float] = {}
        for other, found in list(place.items())[: num_top + 1]:
            name = _name(other, found.decoded_token, as_ids)
            top[name] = max(found.logprob, top.get(name, found.logprob))  # all parts of characters have the same text
        top_logprobs.append(top)
    return {"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs, "text_offset": offsets}


def chat_logprobs(
    places: Sequence[dict[int, Logprob]],
    token_ids: Sequence[int],
    *,
    num_top: int,
    tokenizer: Tokenizer | NoTokenizer,
    as_ids: bool = False,
) -> dict[str, Any]:
    """The logprobs of a chat. places: one per token of `token_ids`. Each lists its `num_top` likeliest tokens."""

    def entry(token_id: int, found: Logprob) -> dict[str, Any]:
        return {
            "token": _name(token_id, found.decoded_token, as_ids),
            "logprob": found.logprob,
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for token_id, place in zip(token_ids, places, strict=True):
        likeliest = sorted(place.items(), key=lambda item: -item[1].logprob)[:num_top]
        content.append(
            entry(token_id, place[token_id]) | {"top_logprobs": [entry(other, found) for other, found in likeliest]}
        )
    return {"content": content, "refusal": None}
