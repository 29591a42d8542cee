"""Word problems, part 1: templates with one step of reasoning.

The letters mean the same in every template; `words.py` lists them.
"""

from random import Random

from .words import BOXES, FRIENDS, GOODS, PLACES, THINGS, Drawn, cap, people, person, pick


def t_add(r: Random) -> Drawn:
    (n, he, *_), o, x, y = person(r), r.choice(THINGS), r.randint(2, 60), r.randint(2, 40)
    v = r.choice(["buys", "finds", "gets", "picks up", "is given", "collects"])
    q = pick(
        r,
        f"{n} has {x} {o}. {cap(he)} {v} {y} more. How many {o} does {n} have now?",
        f"{n} has {x} {o} and then {v} {y} more {o}. How many {o} does {he} have in total?",
        f"There are {x} {o} in {n}'s room. {n} {v} {y} more {o}. How many {o} are there now?",
    )
    steps = [f"{n} has {x} + {y} = {x + y} {o} now."]
    return q, steps, x + y, (n, x, y)


def t_sub(r: Random) -> Drawn:
    (n, he, *_), (m, *_), o, x = *people(r, 2), r.choice(THINGS), r.randint(8, 90)
    y = r.randint(2, x - 2)
    q = pick(
        r,
        f"{n} has {x} {o}. {cap(he)} gives {y} of them to {m}. How many {o} does {n} have left?",
        f"{n} had {x} {o} but lost {y} of them. How many {o} are left?",
        f"{n} puts {x} {o} on a table. {m} takes {y} of them away. How many {o} are still on the table?",
    )
    steps = [f"There are {x} - {y} = {x - y} {o} left."]
    return q, steps, x - y, (n, x, y)


def t_mul(r: Random) -> Drawn:
    (n, he, *_), (b, bs), o, x, y = person(r), r.choice(BOXES), r.choice(THINGS), r.randint(2, 12), r.randint(2, 12)
    q = pick(
        r,
        f"{n} has {x} {bs} with {y} {o} in each {b}. How many {o} does {he} have?",
        f"{n} fills {x} {bs}. Each {b} holds {y} {o}. How many {o} does {n} need?",
        f"There are {y} {o} in one {b}. {n} buys {x} {bs}. How many {o} does {n} buy?",
    )
    steps = [f"{x} {bs} of {y} {o} make {x} * {y} = {x * y} {o}."]
    return q, steps, x * y, (n, x, y)


def t_div(r: Random) -> Drawn:
    (n, he, *_), f, o, k, z = person(r), r.choice(FRIENDS), r.choice(THINGS), r.randint(2, 12), r.randint(2, 12)
    x = k * z
    q = pick(
        r,
        f"{n} shares {x} {o} equally among {k} {f}. How many {o} does each of them get?",
        (
            f"{n} has {x} {o} and {k} {f}. {cap(he)} gives each of the {f} the same number of {o} and has none left. "
            f"How many {o} does each one get?"
        ),
        f"{k} {f} divide {n}'s {x} {o} equally. How many {o} does each one receive?",
    )
    steps = [f"Each of the {k} {f} gets {x} / {k} = {z} {o}."]
    return q, steps, z, (n, x, k)


def t_more(r: Random) -> Drawn:
    (n, *_), (m, *_), o, x, y = *people(r, 2), r.choice(THINGS), r.randint(2, 60), r.randint(2, 40)
    q = pick(
        r,
        f"{n} has {x} {o}. {m} has {y} more {o} than {n}. How many {o} does {m} have?",
        f"{m} has {y} more {o} than {n}, who has {x} {o}. How many {o} does {m} have?",
    )
    steps = [f"{m} has {x} + {y} = {x + y} {o}."]
    return q, steps, x + y, (n, m, x, y)


def t_diff(r: Random) -> Drawn:
    (n, *_), (m, *_), o, y = *people(r, 2), r.choice(THINGS), r.randint(2, 50)
    x = y + r.randint(2, 40)
    q = pick(
        r,
        f"{n} has {x} {o} and {m} has {y} {o}. How many more {o} does {n} have than {m}?",
        f"{m} counts {y} {o}. {n} counts {x} {o}. How many fewer {o} does {m} count than {n}?",
    )
    steps = [f"The difference is {x} - {y} = {x - y} {o}."]
    return q, steps, x - y, (n, m, x, y)


def t_rows(r: Random) -> Drawn:
    (n, *_), x, y = person(r), r.randint(3, 12), r.randint(3, 12)
    o = r.choice(["trees", "chairs", "roses", "tulips", "cabbages", "tiles", "desks", "lamps"])
    q = pick(
        r,
        f"{n} puts {o} in {x} rows with {y} {o} in each row. How many {o} are there?",
        (
            f"In {n}'s {r.choice(PLACES)} there are {x} rows of {o}. Each row has {y} {o}. "
            f"How many {o} are there altogether?"
        ),
    )
    steps = [f"{x} rows of {y} {o} are {x} * {y} = {x * y} {o}."]
    return q, steps, x * y, (n, x, y)


def t_cost(r: Random) -> Drawn:
    (n, he, *_), (g, gs), k, c = person(r), r.choice(GOODS), r.randint(2, 12), r.randint(2, 12)
    q = pick(
        r,
        f"One {g} costs ${c}. {n} buys {k} {gs}. How many dollars does {n} pay?",
        f"{n} buys {k} {gs} for ${c} each. How much does {he} spend?",
    )
    steps = [f"{k} {gs} cost {k} * {c} = {k * c} dollars."]
    return q, steps, k * c, (n, k, c)
