"""Grade-school word problems: the list of templates, and the split into training and held-out problems.

    question, answer = train_problem(Random(1))    # answer: the steps, then a last line "#### <number>"

A problem belongs to the held-out side if a hash of its template, names and numbers says so. Whatever its wording,
that combination never occurs in training.
"""

import hashlib
from collections.abc import Callable
from random import Random

from . import word_problems_one_step as one
from . import word_problems_three_step as three
from . import word_problems_two_step_rates as rates
from . import word_problems_two_step_things as things
from .words import Drawn

NUM_TEST_PROBLEMS = 256
TEST_MODULUS = 61  # a word problem whose key hashes to 0 modulo this is never trained on
TEST_SEED = 20240

# The order decides which template a random number chooses, and the function names go into the hash: keep both.
TEMPLATES: tuple[Callable[[Random], Drawn], ...] = (
    one.t_add,
    one.t_sub,
    one.t_mul,
    one.t_div,
    one.t_more,
    one.t_diff,
    one.t_rows,
    one.t_cost,
    things.t_packs,
    rates.t_change,
    things.t_total2,
    things.t_total_fewer,
    things.t_times,
    rates.t_earn,
    rates.t_pages,
    things.t_eat_share,
    three.t_two_goods,
    things.t_bus,
    rates.t_daily,
    three.t_legs,
    things.t_rows_minus,
    rates.t_age,
    rates.t_trip,
    rates.t_save,
    things.t_half,
    things.t_dozen,
    three.t_hens,
    three.t_budget,
    three.t_three,
    things.t_three_last,
    three.t_machine,
    things.t_teams,
    three.t_half_price,
    three.t_week,
    rates.t_sales,
    things.t_part,
    rates.t_tank,
    things.t_boxes_needed,
    rates.t_points,
    rates.t_left_money,
)


def problem(r: Random) -> tuple[str, str, bool]:
    """One word problem: question, answer text, and whether it is on the held-out side of the split."""
    fn = r.choice(TEMPLATES)
    question, steps, result, key = fn(r)
    assert isinstance(result, int) and result >= 0
    digest = hashlib.md5(repr((fn.__name__, key)).encode()).digest()
    held_out = int.from_bytes(digest[:4], "little") % TEST_MODULUS == 0
    return question, "\n".join(steps) + f"\n#### {result}", held_out


def train_problem(r: Random) -> tuple[str, str]:
    """The next word problem from `r` that is on the training side: question, answer text."""
    while True:
        question, answer, held_out = problem(r)
        if not held_out:
            return question, answer


def test_problems(num_problems: int = NUM_TEST_PROBLEMS) -> list[dict[str, str]]:
    """The first `num_problems` held-out word problems of a fixed seed, as {"question", "answer"}."""
    r, out = Random(TEST_SEED), []
    while len(out) < num_problems:
        question, answer, held_out = problem(r)
        if held_out:
            out.append({"question": question, "answer": answer})
    return out


def as_text(question: str, answer: str) -> str:
    """A word problem in the plain form of the corpus."""
    return f"Question: {question}\nAnswer: {answer}"
