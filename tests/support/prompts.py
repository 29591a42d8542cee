"""Prompts for tests of the bundled model: problems that it solves, and texts that it goes on with."""

from __future__ import annotations

from antiphon.accuracy.evaluate import word_problems

_OPENINGS = (
    "Once upon a time there was a",
    "It was a dark and stormy night, and",
    "The old man looked at the sea and",
    "One day the king",
    '"Where are you going?" asked',
    "In the middle of the forest",
    "My dear friend,",
    "The ship",
)


def mixed_prompts(count: int) -> list[str]:
    """Half word problems, half prose, of many lengths."""
    problems = word_problems()
    prompts = []
    for number in range(count // 2):
        prompts.append(problems[number].prompt)
        opening = _OPENINGS[number % len(_OPENINGS)]
        before = problems[-1 - number].question if number >= len(_OPENINGS) else ""
        prompts.append(f"{before} {opening}".strip())
    return prompts
