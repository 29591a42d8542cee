"""A small tokenizer of a kind that the bundled model does not have."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from antiphon.frontend.tokenizer import Tokenizer

__all__ = ["marked_spaces"]


def marked_spaces(folder: Path) -> Tokenizer:
    """As of Llama's and Mixtral's checkpoints: spaces are marked, the first one is stripped, bytes stand for what has
    no piece.
    """
    decoders, pre_tokenizers, merges = tokenizers.decoders, tokenizers.pre_tokenizers, []
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in ["▁", *"HOacdehilmnoprstuw!é"]:
        vocab[letter] = len(vocab)
    for word in ("▁▁", "▁a", "▁was", "was", "▁wor", "ld", "▁Once", "▁upon", "▁time", "▁there", "▁Hello"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab and set(word) <= vocab.keys():
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": False}))
    return Tokenizer(str(folder))
