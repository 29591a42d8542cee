"""The requests of a serving benchmark: prompts with output lengths, and arrival times.

Pure functions of options and a seed. They use no tokenizer: random prompts are token ids, and the server reports the
lengths of texts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from antiphon.core.errors import OptionError, is_whole, unicode_fault, unknown_value
from antiphon.core.lines import json_lines

logger = logging.getLogger("antiphon")

DATASETS = ("random", "sharegpt", "custom")

_FIRST_ID = 256  # lower ids are often single bytes and special tokens
_CHARACTERS_PER_TOKEN = 4  # approximately, in English
_WORDS = ("the", "of", "to", "and", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "as")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: a text or token ids, and the maximum number of tokens to generate."""

    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The requests to send. Raises `OptionError` for invalid options.

    dataset: one of `DATASETS`. random: prompts of `input_len` and outputs of `output_len` tokens, each drawn from
        the range of plus or minus `range_ratio`. sharegpt, custom: from the file `path`.
    file_output_len: output tokens of every prompt from a file, instead of the lengths in the file.
    as_text: random prompts as words, for a server that accepts no token ids; lengths are then approximate.
    """

    dataset: str = "random"
    path: Path | None = None
    num_prompts: int = 1000
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    vocab_size: int = 4000
    as_text: bool = False
    file_output_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown_value("dataset-name", self.dataset, DATASETS)
        if self.dataset != "random" and self.path is None:
            raise OptionError(
                f"--dataset-name {self.dataset} needs a file", remedy="add --dataset-path FILE", option="dataset-name"
            )
        if not 0 <= self.range_ratio < 1:
            raise OptionError(
                f"--random-range-ratio {self.range_ratio} is out of range",
                remedy="use 0 (all equal) to below 1",
                option="random-range-ratio",
            )
        if self.vocab_size <= _FIRST_ID:
            raise OptionError(
                f"--random-vocab-size {self.vocab_size} is too small",
                remedy=f"use more than {_FIRST_ID}",
                option="random-vocab-size",
            )


def make_asks(workload: Workload, num_extra: int = 0) -> list[Ask]:
    """`num_prompts` requests, followed by `num_extra` more of the same series for the warm-up."""
    num = workload.num_prompts + num_extra
    if workload.dataset == "random":
        return random_asks(workload, num)
    assert workload.path is not None
    found = (_sharegpt if workload.dataset == "sharegpt" else _custom)(workload.path, workload)
    if not found:
        raise OptionError(
            f"--dataset-path {workload.path} contains no prompt",
            remedy="write one object with a prompt per line",
            option="dataset-path",
        )
    return [found[place % len(found)] for place in range(num)]


def random_asks(workload: Workload, num: int, *, seed: Sequence[int] = ()) -> list[Ask]:
    """Random prompts. Lengths depend only on the workload's seed; ids also depend on `seed`."""
    lengths = np.random.default_rng([workload.seed, 0])
    contents = np.random.default_rng([workload.seed, 1, *seed])
    num_inputs = _lengths(lengths, workload.input_len, workload.range_ratio, num)
    num_outputs = _lengths(lengths, workload.output_len, workload.range_ratio, num)
    asks = []
    for num_input, num_output in zip(num_inputs, num_outputs, strict=True):
        if workload.as_text:
            prompt: str | list[int] = " ".join(contents.choice(_WORDS, num_input).tolist())
        else:
            prompt = contents.integers(_FIRST_ID, workload.vocab_size, num_input).tolist()
        asks.append(Ask(prompt=prompt, max_tokens=num_output))
    return asks


def _lengths(random: np.random.Generator, length: int, ratio: float, num: int) -> list[int]:
    low, high = max(1, int(length * (1 - ratio))), max(1, int(np.ceil(length * (1 + ratio))))
    drawn: list[int] = random.integers(low, high + 1, num).tolist()
    return drawn


def _sharegpt(path: Path, workload: Workload) -> list[Ask]:
    """The first questions of conversations, with the estimated lengths of the first answers or `file_output_len`.

    Entries that are not conversations are skipped, and a warning says how many.
    """
    text = _text_of(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"--dataset-path {path} is not JSON",
            limit=str(error),
            remedy="use a file of ShareGPT conversations",
            option="dataset-path",
        ) from error
    if not isinstance(rows, list):
        raise OptionError(
            f"--dataset-path {path} is not a JSON list of entries",
            remedy="use a file of ShareGPT conversations",
            option="dataset-path",
        )
    asks, odd = [], []
    for place, row in enumerate(rows, start=1):
        try:
            question, answer = _first_turns(row)
        except ValueError as error:
            odd.append(f"entry {place} {error}")
            continue
        num_question, num_answer = len(question) // _CHARACTERS_PER_TOKEN, len(answer) // _CHARACTERS_PER_TOKEN
        length = workload.file_output_len or num_answer
        # The usual filter for this dataset: neither very short nor very long ones.
        if 4 <= num_question <= 1024 and length >= 4 and num_question + length <= 2048:
            asks.append(Ask(prompt=question, max_tokens=length))
    told = f"{len(odd)} of {len(rows)} entries are not conversations" + (f" (the first: {odd[0]})" if odd else "")
    if not asks:
        raise OptionError(
            f"--dataset-path {path} contains no usable prompt",
            limit=f"{told}, {len(rows) - len(odd)} are too short or too long",
            remedy='use entries such as {"conversations": [{"value": "a question"}, {"value": "its answer"}]}',
            option="dataset-path",
        )
    if odd:
        logger.warning("--dataset-path %s: %s and were skipped", path, told)
    order = np.random.default_rng(workload.seed).permutation(len(asks))
    return [asks[place] for place in order]


def _first_turns(row: Any) -> tuple[str, str]:
    """The question and the answer. Raises `ValueError` if the entry is malformed."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list):
        raise ValueError("has no list of conversations")
    if len(turns) < 2:
        raise ValueError("has fewer than two turns")
    return _text_of_turn(turns[0], "first"), _text_of_turn(turns[1], "second")


def _text_of_turn(turn: Any, name: str) -> str:
    value = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"has no text as value of its {name} turn")
    if unicode_fault(value):
        raise ValueError(f"has half a character in its {name} turn")
    return value


def _custom(path: Path, workload: Workload) -> list[Ask]:
    """JSON lines with a "prompt", text or token ids, and optional "output_tokens".

    No line is skipped: the user wrote this load, unlike a collection of conversations.
    """
    text = _text_of(path)
    try:
        return [_custom_ask(row, number, workload) for number, row in json_lines(text)]
    except ValueError as error:
        raise OptionError(
            f"--dataset-path {path}, {error}",
            remedy='write one object per line, such as {"prompt": "text", "output_tokens": 64}',
            option="dataset-path",
        ) from error


def _custom_ask(row: Any, number: int, workload: Workload) -> Ask:
    """One request from a line. Raises `ValueError` that begins with the line's number."""
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not an object")
    prompt, output_len = row.get("prompt"), row.get("output_tokens")
    is_ids = isinstance(prompt, list) and all(is_whole(token_id) and token_id >= 0 for token_id in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ValueError(f'line {number} has no "prompt" that is a non-empty text or list of token ids')
    if isinstance(prompt, str) and unicode_fault(prompt):
        raise ValueError(f'line {number} has half a character in its "prompt"')
    if output_len is not None and not (is_whole(output_len) and output_len >= 1):
        raise ValueError(f'line {number} has "output_tokens" that is not an integer of at least 1')
    return Ask(prompt=prompt, max_tokens=workload.file_output_len or output_len or workload.output_len)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"--dataset-path {path} cannot be read",
            limit=str(error),
            remedy="pass a text file in UTF-8",
            option="dataset-path",
        ) from error


def arrival_times(num: int, rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests arrive, the first at 0; all at 0 for an infinite rate.

    Gaps are drawn from a gamma distribution of shape `burstiness`: 1 is a Poisson process, less is burstier. They are
    scaled so that the average rate is exact. Raises `OptionError` for a rate or shape that is not above 0, and if the
    times overflow.
    """
    if not rate > 0:
        raise OptionError(
            f"--request-rate {rate} is not a rate",
            remedy="use a number of requests per second above 0, or inf",
            option="request-rate",
        )
    if not 0 < burstiness < inf:
        raise OptionError(
            f"--burstiness {burstiness} is out of range",
            remedy="use a number above 0; 1 is a Poisson process",
            option="burstiness",
        )
    if rate == inf or num < 2:
        return [0.0] * num
    gaps = np.random.default_rng([seed, 2]).gamma(burstiness, 1.0, num - 1)
    with np.errstate(all="ignore"):  # gaps of a tiny shape are all 0
        times = np.concatenate([[0.0], np.cumsum(gaps)])
        times *= (num - 1) / rate / times[-1]
    if not np.isfinite(times).all():
        raise OptionError(
            f"--burstiness {burstiness:g} and --request-rate {rate:g} give no finite arrival times",
            remedy="use numbers closer to 1",
            option="burstiness",
        )
    scaled: list[float] = times.tolist()
    return scaled
