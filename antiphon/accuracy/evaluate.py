"""Word problems that an engine solves, scored, optionally with overlap off and on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from antiphon.core.bundled import bundled_model
from antiphon.core.lines import json_lines
from antiphon.core.sampling import SamplingParams
from antiphon.frontend.llm import LLM

_ANSWER = re.compile(r"####\s*(-?\d+)")


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A question and the number that answers it."""

    question: str
    number: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    def solved_by(self, text: str) -> bool:
        """Whether the first `#### number` in the text is right."""
        found = _ANSWER.search(text)
        return found is not None and found[1] == self.number


def word_problem_rows() -> list[dict[str, str]]:
    """The rows of the bundled file: `question`, and `answer`, which ends in `#### number`."""
    text = (bundled_model() / "word_problems.jsonl").read_text(encoding="utf-8")
    return [row for _, row in json_lines(text)]


def word_problems() -> list[WordProblem]:
    """All 256 problems. The model was not trained on them."""
    return [WordProblem(row["question"], _ANSWER.findall(row["answer"])[0]) for row in word_problem_rows()]


def solve_word_problems(
    llm: LLM, *, num: int | None = None, max_tokens: int = 100, compare: bool = False, say: Callable[[str], None]
) -> dict[str, Any]:
    """Solve the first `num` problems (by default all) greedily, and `say` the score of each run.

    compare: run once with overlap off and once with it on, whatever the engine's own setting. `equal` counts the
    answers that have the same tokens in both runs. The result can be written as JSON.
    """
    problems = word_problems()[:num]
    prompts = [problem.prompt for problem in problems]
    runs: list[dict[str, Any]] = []
    token_ids = []
    for dbo in ("off", "on") if compare else (None,):
        if dbo is not None:
            llm.reconfigure(dbo=dbo)
        steps_before = llm.stats()["steps_by_plan"]
        start = time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
        seconds = time.perf_counter() - start
        stats = llm.stats()
        steps = {plan: count - steps_before.get(plan, 0) for plan, count in stats["steps_by_plan"].items()}
        solved = sum(problem.solved_by(output.text) for problem, output in zip(problems, outputs, strict=True))
        runs.append({"dbo": stats["dbo"], "solved": solved, "seconds": round(seconds, 3), "steps_by_plan": steps})
        token_ids.append([output.token_ids for output in outputs])
        counts = ", ".join(f"{count} {plan}" for plan, count in steps.items() if count)
        say(f"dbo {stats['dbo']}: {solved} of {len(problems)} solved in {seconds:.1f} s; steps: {counts}")
    result = {
        "problems": len(problems),
        "model": llm.config.options.model,
        "ranks": llm.config.options.ranks,
        "device": llm.config.device_name or llm.config.device_kind,
        "transport": str(llm.config.transport),
        "dtype": llm.config.dtype_name,
        "runs": runs,
    }
    if compare:
        result["equal"] = sum(off == on for off, on in zip(*token_ids, strict=True))
        say(f"{result['equal']} of {len(problems)} answers have the same tokens with overlap off and on")
    return result
