"""Turns token ids into text, one at a time. Parts of a character are held back until it is complete.

detokenizer = Detokenizer(tokenizer, before=TextBefore.of(tokenizer, prompt_ids))
for token_id in output_ids:
    print(detokenizer.add(token_id), end="")
print(detokenizer.flush())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.frontend.token_bytes import num_unfinished_bytes
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer

_UNKNOWN = "\ufffd"
_MOST_HELD = 16  # tokens held back for the rest of a character, which has at most 4 bytes
_LONGEST_BEGINNING = 3  # bytes of an incomplete character


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBefore:
    """What the decoding of a text depends on in the tokens before it, such as a prompt's.

    continues: whether the tokens before `ids` have text. ids: the last tokens, if they end inside a character.
    text: the text of `ids` without that character. num_whole: the number of tokens before `ids`.
    """

    continues: bool = False
    ids: tuple[int, ...] = ()
    text: str = ""
    num_whole: int = 0

    @staticmethod
    def of(tokenizer: Tokenizer | NoTokenizer, token_ids: Sequence[int], *, skip_special: bool = True) -> TextBefore:
        """Make it from the tokens before a text."""
        hidden: frozenset[int] = tokenizer.special_ids if skip_special else frozenset()
        places: list[int] = []
        data = b""
        for place in range(len(token_ids) - 1, -1, -1):  # only the last three bytes matter; one token usually has them
            if token_ids[place] not in hidden:
                places, data = [place, *places], tokenizer.token_bytes(token_ids[place]) + data
            if len(data) >= _LONGEST_BEGINNING or len(places) > _LONGEST_BEGINNING:
                break
        num_bytes = num_unfinished_bytes(data)
        while places and len(data) - len(first := tokenizer.token_bytes(token_ids[places[0]])) >= num_bytes:
            places, data = places[1:], data[len(first) :]
        ids = tuple(token_ids[place] for place in places)
        num_whole = places[0] if places else len(token_ids)
        continues = any(token_id not in hidden for token_id in token_ids[:num_whole])
        text = tokenizer.decode(ids, continues=continues, skip_special=skip_special).rstrip(_UNKNOWN) if ids else ""
        return TextBefore(continues=continues, ids=ids, text=text, num_whole=num_whole)


_NO_TEXT_BEFORE = TextBefore()


def whole_characters(tokenizer: Tokenizer | NoTokenizer, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Decode tokens, without an incomplete character at the end."""
    before = TextBefore.of(tokenizer, token_ids, skip_special=skip_special)
    return tokenizer.decode(token_ids[: before.num_whole], skip_special=skip_special) + before.text


class Detokenizer:
    """Turns token ids into text, one at a time, at a cost per token that does not grow with the text.

    A token's text can depend on its neighbors (spaces, parts of characters), so tokens whose text has not been returned
    yet are decoded together with those of the previous piece.

    before: what precedes the first token, such as a prompt. skip_special: leave special tokens out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | NoTokenizer,
        *,
        before: TextBefore = _NO_TEXT_BEFORE,
        skip_special: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._continues = before.continues
        self._ids = list(before.ids)  # those of the previous piece, then those whose text has not been returned
        self._num_out = 0  # how many of these have had their text returned
        self._text_out = before.text  # what has been returned of the text of these

    def add(self, token_id: int) -> str:
        """Take one token and return the text that is certain now; "" in the middle of a character."""
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids, continues=self._continues)
        certain = text.rstrip(_UNKNOWN)
        new = certain[len(self._text_out) :]
        if new and certain == text:
            self._move(self._num_out)
        elif new:
            self._text_out = certain
        elif len(self._ids) - self._num_out > _MOST_HELD:
            new = self._give_up(text)
        return new

    def flush(self) -> str:
        """Return the text that was held back."""
        text = self._decode(self._ids, continues=self._continues) if self._ids else ""
        new = text[len(self._text_out) :]
        self._move(len(self._ids))
        return new

    def _decode(self, token_ids: Sequence[int], *, continues: bool) -> str:
        return self._tokenizer.decode(token_ids, continues=continues, skip_special=self._skip_special)

    def _move(self, start: int) -> None:
        self._ids = self._ids[start:]
        self._num_out = len(self._ids)
        self._continues = True
        # Usually there is one token, whose text is cached. Skipped special tokens never get here.
        one = self._num_out == 1
        self._text_out = self._tokenizer.token_text(self._ids[0]) if one else self._decode(self._ids, continues=True)

    def _give_up(self, text: str) -> str:
        """Return the text of bytes that never become a character, all but the last tokens, if it can be cut there."""
        cut = len(self._ids) - 4
        before = self._decode(self._ids[:cut], continues=self._continues)
        if before + self._decode(self._ids[cut:], continues=True) != text:
            return ""
        new = before[len(self._text_out) :]
        self._ids, self._num_out, self._text_out, self._continues = self._ids[cut:], 0, "", True
        return new
