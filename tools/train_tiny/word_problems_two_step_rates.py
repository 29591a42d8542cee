"""Word problems, part 3: templates with two steps of reasoning about money, time and rates.

The letters mean the same in every template; `words.py` lists them.
"""

from random import Random

from .words import GOODS, JOBS, TIMES, Drawn, cap, people, person, pick


def t_change(r: Random) -> Drawn:
    (n, he, *_), (g, gs), k, c = person(r), r.choice(GOODS), r.randint(2, 9), r.randint(2, 10)
    bill = min(b for b in (20, 50, 100) if b > k * c)
    q = pick(
        r,
        f"{n} buys {k} {gs} that cost ${c} each and pays with a ${bill} bill. How much change does {he} get?",
        f"A {g} costs ${c}. {n} has ${bill} and buys {k} {gs}. How many dollars does {n} have left?",
    )
    steps = [f"The {gs} cost {k} * {c} = {k * c} dollars.", f"{n} has {bill} - {k * c} = {bill - k * c} dollars left."]
    return q, steps, bill - k * c, (n, k, c, bill)


def t_earn(r: Random) -> Drawn:
    (n, he, *_), h, d = person(r), r.randint(2, 9), r.randint(5, 15)
    s = r.randint(3, h * d - 2)
    j, (g, _) = r.choice(JOBS), r.choice(GOODS)
    q = pick(
        r,
        (
            f"{n} earns ${d} an hour {j}. {cap(he)} works for {h} hours and then spends ${s} on a {g}. "
            f"How many dollars does {he} have left?"
        ),
        f"{n} works {h} hours {j} for ${d} per hour. After that {he} buys a {g} for ${s}. How much money is left?",
    )
    steps = [f"{n} earns {h} * {d} = {h * d} dollars.", f"{cap(he)} has {h * d} - {s} = {h * d - s} dollars left."]
    return q, steps, h * d - s, (n, h, d, s)


def t_pages(r: Random) -> Drawn:
    (n, he, *_), p, d = person(r), r.randint(4, 20), r.randint(2, 9)
    t = p * d + r.randint(3, 90)
    q = pick(
        r,
        f"{n} reads {p} pages of a book every day. The book has {t} pages. How many pages are left after {d} days?",
        (f"A book has {t} pages. {n} reads {p} pages a day for {d} days. How many pages does {he} still have to read?"),
    )
    steps = [f"In {d} days {n} reads {d} * {p} = {d * p} pages.", f"There are {t} - {d * p} = {t - d * p} pages left."]
    return q, steps, t - d * p, (n, p, d, t)


def t_daily(r: Random) -> Drawn:
    (n, *_), x, y, d = person(r), r.randint(2, 12), r.randint(2, 12), r.randint(2, 9)
    o = r.choice(["laps", "songs", "letters", "pictures", "puzzles", "pages", "glasses of water"])
    v = {
        "laps": "runs",
        "songs": "sings",
        "letters": "writes",
        "pictures": "draws",
        "puzzles": "solves",
        "pages": "reads",
        "glasses of water": "drinks",
    }[o]
    q = pick(
        r,
        f"{n} {v} {x} {o} every morning and {y} {o} every evening. How many {o} is that in {d} days?",
        (
            f"Each day {n} {v} {x} {o} in the morning and {y} {o} in the evening. "
            f"How many {o} does that make after {d} days?"
        ),
    )
    steps = [f"Each day {n} {v} {x} + {y} = {x + y} {o}.", f"In {d} days that makes {d} * {x + y} = {d * (x + y)} {o}."]
    return q, steps, d * (x + y), (n, x, y, d)


def t_age(r: Random) -> Drawn:
    (n, *_), (m, *_), x, k, t = *people(r, 2), r.randint(2, 15), r.randint(2, 5), r.randint(2, 15)
    q = pick(
        r,
        f"{n} is {x} years old. {m} is {TIMES[k]} as old as {n}. How old will {m} be in {t} years?",
        f"{m} is {TIMES[k]} as old as {n}, who is {x} years old. What will be the age of {m} after {t} years?",
    )
    steps = [
        f"{m} is {k} * {x} = {k * x} years old now.",
        f"In {t} years {m} will be {k * x} + {t} = {k * x + t} years old.",
    ]
    return q, steps, k * x + t, (n, m, x, k, t)


def t_trip(r: Random) -> Drawn:
    (n, he, *_), s, h, e = person(r), r.randint(3, 15), r.randint(2, 8), r.randint(2, 30)
    v = r.choice(["walks", "rides", "runs", "rows", "hikes"])
    q = pick(
        r,
        (
            f"{n} {v} at {s} miles per hour for {h} hours and then goes {e} more miles by bus. "
            f"How many miles does {he} travel?"
        ),
        (
            f"{n} {v} for {h} hours at a speed of {s} miles per hour. After that {he} travels another {e} miles. "
            f"How far does {n} go in total?"
        ),
    )
    steps = [
        f"In {h} hours {n} goes {h} * {s} = {h * s} miles.",
        f"The whole way is {h * s} + {e} = {h * s + e} miles.",
    ]
    return q, steps, h * s + e, (n, s, h, e)


def t_save(r: Random) -> Drawn:
    (n, he, *_), w, k, (g, _) = person(r), r.randint(3, 15), r.randint(2, 9), r.choice(GOODS)
    c = w * k + r.randint(2, 60)
    q = pick(
        r,
        (
            f"{n} wants to buy a {g} that costs ${c}. {cap(he)} saves ${w} each week for {k} weeks. "
            f"How many more dollars does {he} need?"
        ),
        f"A {g} costs ${c}. {n} has saved ${w} a week for {k} weeks. How much money is still missing?",
    )
    steps = [
        f"{n} has saved {k} * {w} = {k * w} dollars.",
        f"{cap(he)} still needs {c} - {k * w} = {c - k * w} dollars.",
    ]
    return q, steps, c - k * w, (n, w, k, c)


def t_sales(r: Random) -> Drawn:
    (n, he, *_), (g, gs), x, y, c = person(r), r.choice(GOODS), r.randint(2, 20), r.randint(2, 20), r.randint(2, 9)
    q = pick(
        r,
        f"{n} sells {x} {gs} on Monday and {y} {gs} on Tuesday for ${c} each. How much money does {he} make?",
        (
            f"On Saturday {n} sold {x} {gs} and on Sunday {y} {gs}. Each {g} was ${c}. "
            f"How many dollars did {he} take in?"
        ),
    )
    steps = [f"{n} sells {x} + {y} = {x + y} {gs}.", f"That makes {x + y} * {c} = {(x + y) * c} dollars."]
    return q, steps, (x + y) * c, (n, x, y, c)


def t_tank(r: Random) -> Drawn:
    (n, *_), b, h = person(r), r.randint(2, 9), r.randint(2, 9)
    a = b + r.randint(2, 12)
    v = r.choice(["tank", "pool", "pond", "barrel"])
    q = pick(
        r,
        (
            f"Each hour {a} liters of water flow into {n}'s {v} and {b} liters leak out. "
            f"How many liters are in the {v} after {h} hours if it was empty at first?"
        ),
        (
            f"{n} fills an empty {v} with {a} liters of water an hour, but {b} liters an hour leak out. "
            f"How much water is in the {v} after {h} hours?"
        ),
    )
    steps = [
        f"Each hour the {v} gains {a} - {b} = {a - b} liters.",
        f"After {h} hours there are {h} * {a - b} = {h * (a - b)} liters.",
    ]
    return q, steps, h * (a - b), (n, a, b, h)


def t_points(r: Random) -> Drawn:
    (n, *_), (m, *_), a, b, c = *people(r, 2), r.randint(2, 12), r.randint(2, 10), r.randint(2, 40)
    q = (
        f"{n} scores {a} points in each of {b} games. {m} scores {c} points in total. "
        f"How many points do {n} and {m} score together?"
    )
    steps = [f"{n} scores {a} * {b} = {a * b} points.", f"Together they score {a * b} + {c} = {a * b + c} points."]
    return q, steps, a * b + c, (n, m, a, b, c)


def t_left_money(r: Random) -> Drawn:
    (n, he, his, _), a, b = person(r), r.randint(5, 50), r.randint(5, 50)
    c = r.randint(2, a + b - 3)
    g, _ = r.choice(GOODS)
    w = r.choice(["mother", "father", "aunt", "uncle", "grandmother", "grandfather"])
    q = pick(
        r,
        (
            f"{n} has ${a}. {cap(his)} {w} gives {('her' if he == 'she' else 'him')} ${b}. "
            f"Then {he} buys a {g} for ${c}. How many dollars does {n} have now?"
        ),
        f"{n} had ${a} and got ${b} from {his} {w}. After buying a {g} for ${c}, how much money does {he} have?",
    )
    steps = [
        f"{n} has {a} + {b} = {a + b} dollars.",
        f"After buying the {g} {he} has {a + b} - {c} = {a + b - c} dollars.",
    ]
    return q, steps, a + b - c, (n, a, b, c)
