"""The word problems of the bundled model: prompts and the check of an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from antiphon.core.bundled import bundled_model
from antiphon.core.lines import json_lines

_ANSWER = re.compile(r"####\s*(-?\d+)")


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A question, and the number that answers it."""

    question: str
    number: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    def solved_by(self, text: str) -> bool:
        """Whether the text's first `#### number` is right."""
        found = _ANSWER.search(text)
        return found is not None and found[1] == self.number


def word_problems() -> list[WordProblem]:
    """All 256, which the model was not trained on."""
    text = (bundled_model() / "word_problems.jsonl").read_text(encoding="utf-8")
    problems = []
    for _, row in json_lines(text):
        found = _ANSWER.search(row["answer"])
        assert found is not None
        problems.append(WordProblem(row["question"], found[1]))
    return problems
