"""Word problems, part 2: templates with two steps of reasoning about things, people and plants.

The letters mean the same in every template; `words.py` lists them.
"""

from random import Random

from .words import BOXES, FOOD, FRIENDS, THINGS, TIMES, Drawn, cap, people, person, pick


def t_packs(r: Random) -> Drawn:
    (n, he, *_), (b, bs), o = person(r), r.choice(BOXES), r.choice(THINGS)
    x, k, m = r.randint(2, 40), r.randint(2, 9), r.randint(2, 10)
    q = pick(
        r,
        f"{n} has {x} {o}. {cap(he)} buys {k} {bs} with {m} {o} in each {b}. How many {o} does {n} have now?",
        (f"{n} already has {x} {o}. Then {he} gets {k} {bs} of {m} {o} each. How many {o} does {he} have altogether?"),
    )
    steps = [f"{n} gets {k} * {m} = {k * m} new {o}.", f"{n} now has {x} + {k * m} = {x + k * m} {o}."]
    return q, steps, x + k * m, (n, x, k, m)


def t_total2(r: Random) -> Drawn:
    (n, *_), (m, *_), o, x, y = *people(r, 2), r.choice(THINGS), r.randint(2, 50), r.randint(2, 30)
    q = pick(
        r,
        f"{n} has {x} {o}. {m} has {y} more {o} than {n}. How many {o} do they have together?",
        f"{n} collects {x} {o} and {m} collects {y} more than {n}. How many {o} do the two collect in total?",
    )
    steps = [f"{m} has {x} + {y} = {x + y} {o}.", f"Together they have {x} + {x + y} = {2 * x + y} {o}."]
    return q, steps, 2 * x + y, (n, m, x, y)


def t_total_fewer(r: Random) -> Drawn:
    (n, *_), (m, *_), o, x = *people(r, 2), r.choice(THINGS), r.randint(8, 60)
    y = r.randint(2, x - 3)
    q = pick(
        r,
        f"{n} has {x} {o}. {m} has {y} fewer {o} than {n}. How many {o} do they have together?",
        f"{m} has {y} fewer {o} than {n}. {n} has {x} {o}. How many {o} do {n} and {m} have in all?",
    )
    steps = [f"{m} has {x} - {y} = {x - y} {o}.", f"Together they have {x} + {x - y} = {2 * x - y} {o}."]
    return q, steps, 2 * x - y, (n, m, x, y)


def t_times(r: Random) -> Drawn:
    (n, *_), (m, *_), o, x, k = *people(r, 2), r.choice(THINGS), r.randint(2, 20), r.randint(2, 5)
    q = pick(
        r,
        f"{n} has {x} {o}. {m} has {TIMES[k]} as many {o} as {n}. How many {o} do they have together?",
        f"{m} has {TIMES[k]} as many {o} as {n}. If {n} has {x} {o}, how many {o} do they have in total?",
    )
    steps = [f"{m} has {k} * {x} = {k * x} {o}.", f"Together they have {x} + {k * x} = {x + k * x} {o}."]
    return q, steps, x + k * x, (n, m, x, k)


def t_eat_share(r: Random) -> Drawn:
    (n, he, *_), f, o = person(r), r.choice(FRIENDS), r.choice(FOOD)
    k, z, e = r.randint(2, 9), r.randint(2, 10), r.randint(2, 12)
    x = k * z + e
    q = pick(
        r,
        (
            f"{n} has {x} {o}. {cap(he)} eats {e} of them and shares the rest equally among {k} {f}. "
            f"How many {o} does each of them get?"
        ),
        (
            f"{n} buys {x} {o} and eats {e}. The other {o} are divided equally among {k} {f}. "
            f"How many {o} does each one get?"
        ),
    )
    steps = [f"After {n} eats {e}, there are {x} - {e} = {k * z} {o} left.", f"Each one gets {k * z} / {k} = {z} {o}."]
    return q, steps, z, (n, x, e, k)


def t_bus(r: Random) -> Drawn:
    (n, *_), x = person(r), r.randint(12, 50)
    y = r.randint(2, x - 4)
    z = r.randint(2, 20)
    v = r.choice(["bus", "train", "boat", "tram"])
    q = pick(
        r,
        (
            f"{n} drives a {v} with {x} people on it. At the first stop {y} people get off and {z} people get on. "
            f"How many people are on the {v} now?"
        ),
        (
            f"There are {x} people on {n}'s {v}. {y} people leave and then {z} new people come on. "
            f"How many people are on the {v}?"
        ),
    )
    steps = [
        f"After {y} people get off there are {x} - {y} = {x - y} people.",
        f"Then there are {x - y} + {z} = {x - y + z} people.",
    ]
    return q, steps, x - y + z, (n, x, y, z)


def t_rows_minus(r: Random) -> Drawn:
    (n, *_), x, y = person(r), r.randint(3, 10), r.randint(3, 10)
    z = r.randint(2, x * y - 2)
    o = r.choice(["trees", "roses", "tulips", "cabbages", "tomatoes", "bushes"])
    w = r.choice(["die", "are sold", "are cut down", "are given away"])
    q = f"{n} plants {x} rows of {o} with {y} {o} in each row. Later {z} of the {o} {w}. How many {o} are left?"
    steps = [f"{n} plants {x} * {y} = {x * y} {o}.", f"There are {x * y} - {z} = {x * y - z} {o} left."]
    return q, steps, x * y - z, (n, x, y, z)


def t_half(r: Random) -> Drawn:
    (n, he, his, _), (m, *_), o, z = *people(r, 2), r.choice(THINGS), r.randint(3, 40)
    y = r.randint(2, z - 1)
    q = pick(
        r,
        (
            f"{n} has {2 * z} {o}. {cap(he)} gives half of them to {m} and loses {y} more. "
            f"How many {o} does {n} have left?"
        ),
        (
            f"{n} gives half of {his} {2 * z} {o} to {m}. Then {he} drops {y} {o} on the way home. "
            f"How many {o} are left?"
        ),
    )
    steps = [f"{n} gives away {2 * z} / 2 = {z} {o} and keeps {z}.", f"There are {z} - {y} = {z - y} {o} left."]
    return q, steps, z - y, (n, m, z, y)


def t_dozen(r: Random) -> Drawn:
    (n, he, *_), k = person(r), r.randint(2, 9)
    y = r.randint(2, 12 * k - 2)
    o, v = r.choice(
        [("eggs", "uses"), ("cookies", "sells"), ("muffins", "sells"), ("roses", "sells"), ("pencils", "uses")]
    )
    q = pick(
        r,
        f"{n} has {k} dozen {o}. {cap(he)} {v} {y} of them. How many {o} are left?",
        f"{n} buys {k} dozen {o} and {v} {y} {o}. How many {o} does {he} still have?",
    )
    steps = [f"{k} dozen {o} are {k} * 12 = {12 * k} {o}.", f"There are {12 * k} - {y} = {12 * k - y} {o} left."]
    return q, steps, 12 * k - y, (n, k, y)


def t_three_last(r: Random) -> Drawn:
    (n, *_), (m, *_), (p, *_), o = *people(r, 3), r.choice(THINGS)
    x, y = r.randint(10, 60), r.randint(2, 20)
    z = r.randint(2, x + y - 3)
    q = f"{n} has {x} {o}. {m} has {y} more {o} than {n}. {p} has {z} fewer {o} than {m}. How many {o} does {p} have?"
    steps = [f"{m} has {x} + {y} = {x + y} {o}.", f"{p} has {x + y} - {z} = {x + y - z} {o}."]
    return q, steps, x + y - z, (n, m, p, x, y, z)


def t_teams(r: Random) -> Drawn:
    (n, *_), k, z = person(r), r.randint(2, 9), r.randint(3, 9)
    b = r.randint(3, k * z - 3)
    g = k * z - b
    q = pick(
        r,
        (
            f"There are {b} boys and {g} girls in {n}'s class. The teacher makes {k} teams of equal size. "
            "How many children are in each team?"
        ),
        (
            f"{n}'s class has {b} boys and {g} girls. They are split into {k} equal groups. "
            "How many children does each group have?"
        ),
    )
    steps = [f"There are {b} + {g} = {k * z} children.", f"Each group has {k * z} / {k} = {z} children."]
    return q, steps, z, (n, b, g, k)


def t_part(r: Random) -> Drawn:
    (n, *_), f, o, z = person(r), r.choice([2, 3, 4, 5, 10]), r.choice(THINGS), r.randint(2, 20)
    w = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 10: "a tenth"}[f]
    c = r.choice(["red", "blue", "green", "yellow", "white", "broken", "new", "old"])
    q = f"{n} has {f * z} {o}. {cap(w)} of the {o} are {c}. How many of the {o} are not {c}?"
    steps = [f"{f * z} / {f} = {z} of the {o} are {c}.", f"The other {f * z} - {z} = {f * z - z} {o} are not {c}."]
    return q, steps, f * z - z, (n, f, z)


def t_boxes_needed(r: Random) -> Drawn:
    (n, he, *_), (b, bs), o, k, z = person(r), r.choice(BOXES), r.choice(THINGS), r.randint(2, 10), r.randint(2, 10)
    x = r.randint(2, k * z - 2)
    y = k * z - x
    q = pick(
        r,
        (
            f"{n} has {x} {o} and gets {y} more. {cap(he)} packs all of them in {bs} of {k} {o}. "
            f"How many {bs} does {he} need?"
        ),
        (
            f"{n} picks {x} {o} in the morning and {y} {o} in the afternoon. Each {b} holds {k} {o}. "
            f"How many {bs} does {n} fill?"
        ),
    )
    steps = [f"{n} has {x} + {y} = {k * z} {o}.", f"{cap(he)} needs {k * z} / {k} = {z} {bs}."]
    return q, steps, z, (n, x, y, k)
