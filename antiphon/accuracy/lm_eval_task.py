"""The documents of the task `word_problems` of lm_eval, which `antiphon/data/lm_eval/word_problems.yaml` declares."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict

from antiphon.core.bundled import bundled_model
from antiphon.core.lines import json_lines

_NUM_EXAMPLES = 32


def load_word_problems(**_: Any) -> DatasetDict:
    """`examples`, from which few-shot prompts are made, and `test`: 224 others. Reads the bundled file, no hub.

    lm_eval calls it, with the metadata of the task, for which there is no use here.
    """
    text = (bundled_model() / "word_problems.jsonl").read_text(encoding="utf-8")
    problems = [problem for _, problem in json_lines(text)]
    return DatasetDict(
        {"examples": Dataset.from_list(problems[:_NUM_EXAMPLES]), "test": Dataset.from_list(problems[_NUM_EXAMPLES:])}
    )
