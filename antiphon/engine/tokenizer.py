"""The checkpoint's tokenizer, by transformers, and the lack of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from antiphon.core.errors import ModelError, RequestError
from antiphon.core.warn_once import warn_once

__all__ = ["NoTokenizer", "Tokenizer"]


class Tokenizer:
    """Text to token ids and back, as the checkpoint's files say. Reads only the local folder.

    has_text: whether tokens have texts at all. special_ids: tokens that have none in `decode`.
    """

    has_text = True

    def __init__(self, folder: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # takes seconds, and only the front needs it

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._decode = _plain_decode(self._tokenizer)
            self._anchor, self._num_anchor_chars = self._find_anchor()
        except Exception as error:  # tokenizers raises no narrower class for a format that it does not know
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"the tokenizer in {folder} cannot be loaded ({reason}); download it again, or upgrade tokenizers and "
                "transformers"
            ) from error
        added = self._tokenizer.added_tokens_decoder
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_texts: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With the special tokens that the checkpoint puts in front, unless they are not wanted."""
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, continues: bool = False) -> str:
        """Without special tokens. continues: whether text comes before; where none does, some lose a space."""
        if continues and self._anchor:
            return self._decode([*self._anchor, *token_ids], skip_special_tokens=True)[self._num_anchor_chars :]
        return self._decode(token_ids, skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """Of one token that continues a text, special or not; of a part of a character "\ufffd"."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._decode([*self._anchor, token_id], skip_special_tokens=False)[self._num_anchor_chars :]
            self._token_texts[token_id] = text
        return text

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """By the checkpoint's chat template, up to where the assistant answers."""
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except ValueError as error:
            raise ModelError(f"this checkpoint cannot format a chat ({str(error).splitlines()[0]})") from error
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _find_anchor(self) -> tuple[list[int], int]:
        """A token that others are decoded after, as text before them, and how long its text is.

        None where the beginning of a text is decoded as the rest of it. With SentencePiece and what imitates it (Llama,
        Mixtral) it loses its space.
        """
        ids = self.encode("a a", add_special_tokens=False)
        if self.decode(ids) == "".join(self.decode([token_id]) for token_id in ids):
            return [], 0
        return ids[-1:], len(self.decode(ids[-1:]))


def _plain_decode(tokenizer: Any) -> Callable[..., str]:
    """What transformers' `decode` calls in the end, without what it does around it for every token of every stream.

    The tokenizer's own `decode` where it does more than that.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        warn_once(
            f"the tokenizer of this checkpoint ({type(tokenizer).__name__}) runs in Python",
            cost="texts are encoded and decoded several times slower",
            remedy="use a checkpoint that has a tokenizer.json",
        )
    own = [getattr(type(tokenizer), name, None) for name in ("decode", "_decode")]
    usual = all(getattr(method, "__module__", "").startswith("transformers.tokenization_utils") for method in own)
    found = backend if backend is not None and usual and not tokenizer.clean_up_tokenization_spaces else tokenizer
    return found.decode  # type: ignore[no-any-return]


class NoTokenizer:
    """For dummy weights, whose output means nothing: prompts are token ids, and every text is empty."""

    has_text = False
    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise RequestError("a run with dummy weights has no tokenizer; pass token ids instead of a text")

    def decode(self, token_ids: Sequence[int], *, continues: bool = False) -> str:
        return ""

    def token_text(self, token_id: int) -> str:
        return ""

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("")
