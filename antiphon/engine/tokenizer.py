"""The checkpoint's tokenizer, by transformers, and the lack of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from antiphon.core.errors import ModelError, RequestError

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
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"the tokenizer in {folder} cannot be loaded ({reason}); download it again") from error
        added = self._tokenizer.added_tokens_decoder
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_texts: dict[int, str] = {}
        self._decode = _plain_decode(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With the special tokens that the checkpoint puts in front, unless they are not wanted."""
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens."""
        return self._decode(list(token_ids), skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """Of one token alone, special or not; of a part of a character "\ufffd"."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._decode([token_id], skip_special_tokens=False)
        return text

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """By the checkpoint's chat template, up to where the assistant answers."""
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except ValueError as error:
            raise ModelError(f"this checkpoint cannot format a chat ({str(error).splitlines()[0]})") from error
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _plain_decode(tokenizer: Any) -> Callable[..., str]:
    """What transformers' `decode` calls in the end, without what it does around it for every token of every stream.

    The tokenizer's own `decode` where it does more than that.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
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

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""

    def token_text(self, token_id: int) -> str:
        return ""

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("")
