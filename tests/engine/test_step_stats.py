"""How a step was launched is counted, and why it was not replayed."""

from __future__ import annotations

import pytest

from antiphon.core.plan import EagerReason, Plan
from antiphon.engine.stats import StepStats

PROMPTS, TOO_LARGE = EagerReason.PROMPTS.text, EagerReason.TOO_LARGE.text
NO_SIZES = EagerReason.NO_SIZES.text


@pytest.mark.parametrize(
    ("obstacle", "counted"),
    [
        ("", {PROMPTS: 1, TOO_LARGE: 1, NO_SIZES: 1}),
        # a step that has a graph's shape lacks only the graph; the others would be eager anyway
        ("nothing can be captured", {PROMPTS: 1, TOO_LARGE: 1, "nothing can be captured": 2}),
    ],
)
def test_why_steps_are_eager(obstacle: str, counted: dict[str, int]) -> None:
    stats = StepStats(2, obstacle=obstacle)
    stats.add(Plan(part_tokens=((3,),), graph=4, reason="x"), replayed=not obstacle)
    for reason in (EagerReason.PROMPTS, EagerReason.TOO_LARGE, EagerReason.NO_SIZES):
        stats.add(Plan(part_tokens=((3,),), eager=reason, reason="x"))
    found = stats.to_dict()
    assert found["steps"] == 4
    assert found["graphs"] == {"replayed": int(not obstacle), "padded": 1, "eager_reasons": counted}


def test_synchronous_steps_are_counted_by_reason() -> None:
    stats = StepStats(2)
    plan = Plan(part_tokens=((3,),), graph=4, reason="x")
    for synchronous in ("logprobs", "", "logprobs", "penalties"):
        stats.add(plan, replayed=True, synchronous=synchronous)
    assert stats.to_dict()["synchronous_reasons"] == {"logprobs": 2, "penalties": 1}
    assert stats.to_dict()["graphs"] == {"replayed": 4, "padded": 4, "eager_reasons": {}}


def test_every_reason_has_a_text_of_its_own() -> None:
    assert len({reason.text for reason in EagerReason}) == len(EagerReason)
