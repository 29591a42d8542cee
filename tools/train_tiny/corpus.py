"""Stage "prepare": the tokenizer, the held-out sets, and the prose as one stream of tokens.

OUT  <- tokenizer files, word_problems.jsonl (held-out problems), heldout.txt (held-out prose)
WORK <- prose.npz, books_used.txt, and the books themselves unless a checkout is given

Word problems and stories for training are not stored: `feed.py` generates them during training.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from .documents import problem_doc, story_doc
from .prose import Book, clone_books, hold_out, read_books
from .tokenizer import EOS, save_tokenizer, train_tokenizer
from .word_problems import test_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer

TOKENIZER_SEED = 1
MAX_CHARS_PER_BOOK = 120_000  # of each part of a book, for training the tokenizer
NUM_PROBLEM_DOCS, NUM_STORY_DOCS = 6000, 4000  # for training the tokenizer


def without_special_tokens(text: str) -> str:
    """`text` with a line break for every special token."""
    return re.sub(r"<\|\w+\|>", "\n", text)


def tokenizer_texts(prose: list[str]) -> Iterator[str]:
    """What the tokenizer is trained on: the beginnings of the books in random order, then generated documents."""
    r = Random(TOKENIZER_SEED)
    sample = r.sample(prose, len(prose))
    generated = [without_special_tokens(problem_doc(r)) for _ in range(NUM_PROBLEM_DOCS)]
    generated += [without_special_tokens(story_doc(r)) for _ in range(NUM_STORY_DOCS)]
    return itertools.chain((text[:MAX_CHARS_PER_BOOK] for text in sample), generated)


def encode_prose(tok: Tokenizer, books: list[Book]) -> tuple[np.ndarray, np.ndarray]:
    """One token stream and the offsets at which paragraphs start: uint16 [num_tokens], int32 [num_paragraphs]."""
    blank_line = tok.encode("\n\n", add_special_tokens=False).ids
    parts, starts, num_tokens = [], [], 0
    for _, paragraphs in books:
        for encoding in tok.encode_batch(paragraphs, add_special_tokens=False):
            starts.append(num_tokens)
            parts.append(np.array(encoding.ids + blank_line, dtype=np.uint16))
            num_tokens += len(parts[-1])
        parts.append(np.array([EOS], dtype=np.uint16))
        num_tokens += 1
    return np.concatenate(parts), np.array(starts, dtype=np.int32)


def prepare(out: Path, work: Path, books_checkout: Path | None = None) -> None:
    """Build the corpus and the tokenizer into OUT and WORK; without a checkout of the books, clone one into WORK."""
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)

    # 1. Books, and the passages held out from them.
    if books_checkout is None:
        books_checkout = work / "books"
        clone_books(books_checkout)
    train, held = hold_out(read_books(books_checkout))
    heldout = "\n\n\n".join("\n\n".join(paragraphs) for _, paragraphs in held) + "\n"
    (out / "heldout.txt").write_text(heldout)

    # 2. Held-out word problems.
    with open(out / "word_problems.jsonl", "w") as file:
        for p in test_problems():
            file.write(json.dumps(p) + "\n")

    # 3. Tokenizer.
    prose = ["\n\n".join(paragraphs) for _, paragraphs in train]
    tok = train_tokenizer(tokenizer_texts(prose))
    save_tokenizer(tok, out)

    # 4. Prose as tokens.
    ids, starts = encode_prose(tok, train)
    np.savez_compressed(work / "prose.npz", ids=ids, starts=starts)
    titles = sorted({title for title, _ in train})
    (work / "books_used.txt").write_text("\n".join(titles) + "\n")

    num_chars, num_tokens = sum(map(len, prose)), len(ids)
    print(
        f"prose: {len(titles)} books, {num_chars / 1e6:.1f} M characters, {num_tokens / 1e6:.2f} M tokens "
        f"({num_chars / num_tokens:.2f} characters a token), held out {len(heldout)} characters; "
        f"vocabulary {tok.get_vocab_size()}"
    )
