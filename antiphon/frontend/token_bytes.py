"""Finds the bytes that a token stands for in the vocabulary.

Decoding a single token does not give them: a part of a character becomes U+FFFD. Vocabularies write bytes in two ways.
Byte-level ones (GPT-2 and its descendants) have a character for each byte. SentencePiece has pieces like `<0xE4>` for
the bytes of characters without a piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def bytes_reader(backend: Any) -> Callable[[str], bytes | None]:
    """Make a function from a token of a `tokenizers.Tokenizer` to its bytes, or to `None` if it must be decoded."""
    kinds = _decoder_kinds(backend)
    if "ByteLevel" in kinds:
        byte_of = _byte_characters()

        def byte_level(token: str) -> bytes:
            # Like the decoder: a token with any other character, such as an added token, is plain text.
            found = [byte_of.get(character) for character in token]
            return token.encode() if None in found else bytes(byte for byte in found if byte is not None)

        return byte_level
    if "ByteFallback" in kinds:

        def byte_piece(token: str) -> bytes | None:
            found = _BYTE_PIECE.fullmatch(token)
            return bytes([int(found[1], 16)]) if found else None

        return byte_piece
    return lambda token: None


def _decoder_kinds(backend: Any) -> set[str]:
    """Return the type of the decoder, and those of its parts."""
    decoder = None if backend is None else backend.decoder
    if decoder is None:
        return set()
    settings = json.loads(decoder.__getstate__())
    return {part["type"] for part in [settings, *settings.get("decoders", [])]}


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 is itself, the others are U+0100 and up, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def num_unfinished_bytes(data: bytes) -> int:
    """The number of bytes, 0 to 3, at the end that belong to an incomplete UTF-8 character."""
    for count in range(1, min(len(data), 3) + 1):
        byte = data[-count]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return count if count < needed else 0
        if byte < 0x80:
            return 0
    return 0
