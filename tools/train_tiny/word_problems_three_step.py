"""Word problems, part 4: templates with three steps of reasoning.

The letters mean the same in every template; `words.py` lists them.
"""

from random import Random

from .words import GOODS, THINGS, TIMES, Drawn, cap, people, person, pick


def t_two_goods(r: Random) -> Drawn:
    (n, he, *_), ((g, gs), (h, hs)) = person(r), r.sample(GOODS, 2)
    a, c, b, d = r.randint(2, 9), r.randint(2, 9), r.randint(2, 9), r.randint(2, 9)
    q = pick(
        r,
        f"{n} buys {a} {gs} for ${c} each and {b} {hs} for ${d} each. How much does {he} pay in total?",
        f"A {g} costs ${c} and a {h} costs ${d}. {n} buys {a} {gs} and {b} {hs}. How many dollars does {n} spend?",
    )
    steps = [
        f"The {gs} cost {a} * {c} = {a * c} dollars.",
        f"The {hs} cost {b} * {d} = {b * d} dollars.",
        f"In total {n} pays {a * c} + {b * d} = {a * c + b * d} dollars.",
    ]
    return q, steps, a * c + b * d, (n, a, c, b, d)


def t_legs(r: Random) -> Drawn:
    (n, *_), x, y = person(r), r.randint(2, 15), r.randint(2, 15)
    a, b = r.choice(["cows", "horses", "sheep", "goats", "pigs", "dogs"]), r.choice(["chickens", "ducks", "geese"])
    q = pick(
        r,
        (
            f"{n} has {x} {a} and {y} {b} on a farm. Each of the {a} has 4 legs and each of the {b} has 2 legs. "
            "How many legs do the animals have in total?"
        ),
        (
            f"On {n}'s farm there are {x} {a} with 4 legs each and {y} {b} with 2 legs each. "
            "How many legs are there altogether?"
        ),
    )
    steps = [
        f"The {a} have {x} * 4 = {4 * x} legs.",
        f"The {b} have {y} * 2 = {2 * y} legs.",
        f"In total there are {4 * x} + {2 * y} = {4 * x + 2 * y} legs.",
    ]
    return q, steps, 4 * x + 2 * y, (n, x, y)


def t_hens(r: Random) -> Drawn:
    (n, he, *_), e, p = person(r), r.randint(12, 40), r.randint(2, 9)
    a, b = r.randint(2, 5), r.randint(2, 5)
    s = e - a - b
    q = pick(
        r,
        (
            f"{n}'s hens lay {e} eggs a day. {cap(he)} eats {a} eggs for breakfast and bakes with {b} eggs. "
            f"The other eggs are sold for ${p} each. How many dollars does {n} make every day?"
        ),
        (
            f"{n} collects {e} eggs each day, keeps {a} for breakfast and uses {b} for a cake. "
            f"{cap(he)} sells the rest for ${p} per egg. How much money does {he} make each day?"
        ),
    )
    steps = [
        f"{n} uses {a} + {b} = {a + b} eggs.",
        f"{cap(he)} sells {e} - {a + b} = {s} eggs.",
        f"{cap(he)} makes {s} * {p} = {s * p} dollars.",
    ]
    return q, steps, s * p, (n, e, a, b, p)


def t_budget(r: Random) -> Drawn:
    (n, he, *_), ((_, gs), (h, _)) = person(r), r.sample(GOODS, 2)
    a, c, d = r.randint(2, 8), r.randint(2, 9), r.randint(2, 20)
    t = a * c + d
    m = t + r.randint(2, 40)
    q = pick(
        r,
        (
            f"{n} has ${m}. {cap(he)} buys {a} {gs} for ${c} each and one {h} for ${d}. "
            f"How many dollars does {n} have left?"
        ),
        (
            f"{n} goes shopping with ${m} and buys a {h} for ${d} and {a} {gs} that cost ${c} each. "
            f"How much money does {he} have left?"
        ),
    )
    steps = [
        f"The {gs} cost {a} * {c} = {a * c} dollars.",
        f"Together with the {h} that is {a * c} + {d} = {t} dollars.",
        f"{n} has {m} - {t} = {m - t} dollars left.",
    ]
    return q, steps, m - t, (n, m, a, c, d)


def t_three(r: Random) -> Drawn:
    (n, *_), (m, *_), (p, *_), o = *people(r, 3), r.choice(THINGS)
    x, k, y = r.randint(2, 15), r.randint(2, 4), r.randint(2, 20)
    q = pick(
        r,
        (
            f"{n} has {x} {o}. {m} has {TIMES[k]} as many {o} as {n}. {p} has {y} more {o} than {m}. "
            f"How many {o} do the three of them have together?"
        ),
        (
            f"{m} has {TIMES[k]} as many {o} as {n}, and {p} has {y} more {o} than {m}. "
            f"If {n} has {x} {o}, how many {o} do they have in all?"
        ),
    )
    b, c = k * x, k * x + y
    steps = [
        f"{m} has {k} * {x} = {b} {o}.",
        f"{p} has {b} + {y} = {c} {o}.",
        f"Together they have {x} + {b} + {c} = {x + b + c} {o}.",
    ]
    return q, steps, x + b + c, (n, m, p, x, k, y)


def t_machine(r: Random) -> Drawn:
    (n, *_), k, h, x = person(r), r.randint(2, 6), r.randint(2, 6), r.randint(2, 8)
    o = r.choice(THINGS)
    d = r.randint(2, max(2, min(20, k * h * x - 2)))
    q = pick(
        r,
        (
            f"{n}'s workshop has {k} machines. Each machine packs {x} {o} per hour. "
            f"The machines run for {h} hours, but {d} of the {o} are broken. How many good {o} are there?"
        ),
        (
            f"Every machine in {n}'s workshop makes {x} {o} an hour. "
            f"{k} machines work for {h} hours, and {d} {o} are thrown away. How many {o} remain?"
        ),
    )
    steps = [
        f"In one hour the machines handle {k} * {x} = {k * x} {o}.",
        f"In {h} hours that is {h} * {k * x} = {h * k * x} {o}.",
        f"There are {h * k * x} - {d} = {h * k * x - d} good {o}.",
    ]
    return q, steps, h * k * x - d, (n, k, h, x, d)


def t_half_price(r: Random) -> Drawn:
    (n, he, *_), ((g, _), (h, hs)), z, k = person(r), r.sample(GOODS, 2), r.randint(2, 10), r.randint(2, 8)
    q = pick(
        r,
        (f"A {g} costs ${2 * z} and a {h} costs half as much. {n} buys one {g} and {k} {hs}. How much does {he} pay?"),
        (
            f"{n} buys one {g} for ${2 * z} and {k} {hs}. Each {h} costs half as much as the {g}. "
            f"How many dollars does {he} spend?"
        ),
    )
    steps = [
        f"One {h} costs {2 * z} / 2 = {z} dollars.",
        f"{k} {hs} cost {k} * {z} = {k * z} dollars.",
        f"In total {n} pays {2 * z} + {k * z} = {2 * z + k * z} dollars.",
    ]
    return q, steps, 2 * z + k * z, (n, z, k)


def t_week(r: Random) -> Drawn:
    (n, he, *_), a, b = person(r), r.randint(2, 15), r.randint(2, 20)
    o, v = r.choice(
        [("pages", "reads"), ("laps", "swims"), ("pictures", "draws"), ("letters", "writes"), ("miles", "rides")]
    )
    q = pick(
        r,
        (
            f"{n} {v} {a} {o} on each of the 5 weekdays and {b} {o} on each of the 2 weekend days. "
            f"How many {o} is that in a week?"
        ),
        (
            f"On 5 days of the week {n} {v} {a} {o} a day. On the other 2 days {he} {v} {b} {o} a day. "
            f"How many {o} does that make in one week?"
        ),
    )
    steps = [
        f"On the 5 days {n} {v} 5 * {a} = {5 * a} {o}.",
        f"On the 2 days {he} {v} 2 * {b} = {2 * b} {o}.",
        f"In a week that makes {5 * a} + {2 * b} = {5 * a + 2 * b} {o}.",
    ]
    return q, steps, 5 * a + 2 * b, (n, a, b)
