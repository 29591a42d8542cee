"""Short animal stories from a small grammar: two animals, six plots, a few wordings of each sentence.

    text = story(Random(1), animal="fox", name="Ruby")    # both optional

The order and number of the phrases are part of the corpus, as is the order of the draws from `r`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .words import BOYS, GIRLS, cap, pick, with_article, word_list

ANIMALS = word_list("""
    fox rabbit bear mouse owl duck hedgehog squirrel kitten puppy frog turtle lamb pony goat hen deer badger otter
    sparrow
""")
TRAITS = word_list("""
    little small brave shy kind clever curious gentle quiet cheerful sleepy lonely young playful careful
""")
HOMES = (
    "in a green forest",
    "near a quiet lake",
    "in a small village",
    "at the edge of a meadow",
    "under an old oak tree",
    "on a sunny farm",
    "by a wide river",
    "at the foot of a tall hill",
    "behind a little red house",
    "in a warm valley",
)
LOST = (
    ("a shiny red ball", "ball"),
    ("a little golden key", "key"),
    ("a blue kite", "kite"),
    ("a warm woolen hat", "hat"),
    ("a small silver bell", "bell"),
    ("a book of pictures", "book"),
    ("a wooden boat", "boat"),
    ("a green scarf", "scarf"),
    ("a tin drum", "drum"),
    ("a yellow lantern", "lantern"),
)
SPOTS = (
    "behind a big rock",
    "under a pile of leaves",
    "in the tall grass",
    "next to the stream",
    "inside a hollow log",
    "on top of a fence",
    "in the branches of a tree",
    "between two mossy stones",
    "beside the garden gate",
    "at the bottom of a basket",
)
WEATHER = (
    "The sun was shining and the birds were singing.",
    "A soft wind was blowing through the trees.",
    "It was a cold morning and the grass was white with frost.",
    "Grey clouds hung over the hills.",
    "The air smelled of flowers and fresh bread.",
    "It had rained all night and the path was full of puddles.",
)
TREATS = (
    "honey cakes",
    "sweet berries",
    "warm bread",
    "apple pie",
    "nut cookies",
    "pumpkin soup",
    "fresh cheese",
    "plum jam",
)
LESSONS = (
    "It is always good to help a friend.",
    "A kind word can make a hard day easy.",
    "If you share what you have, you are never poor.",
    "Even the smallest of us can do great things.",
    "It is better to ask for help than to be sad alone.",
    "Patience finds what hurry loses.",
    "A true friend stays when the weather is bad.",
    "Being brave does not mean that you are never afraid.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hero:
    """An animal with a name, its pronouns and one trait."""

    name: str
    animal: str
    he: str
    his: str
    him: str
    trait: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What every plot needs: hero `a`, second animal `b`, how `b` is introduced, and a sentence on the weather."""

    a: Hero
    b: Hero
    friend: str
    weather: str


def hero(r: Random, animal: str | None = None, name: str | None = None) -> Hero:
    """A random hero; a given name decides the pronouns if it is in one of the lists of names."""
    boy = r.random() < 0.5
    name = name or r.choice(BOYS if boy else GIRLS)
    if name in BOYS:
        boy = True
    elif name in GIRLS:
        boy = False
    return Hero(
        name=name,
        animal=animal or r.choice(ANIMALS),
        he="he" if boy else "she",
        his="his" if boy else "her",
        him="him" if boy else "her",
        trait=r.choice(TRAITS),
    )


def plot_lost(r: Random, s: Scene) -> list[str]:
    """Something is lost, and found with the help of a friend."""
    a, b, he_cap = s.a, s.b, cap(s.a.he)
    (thing, short), spot, other_spot = r.choice(LOST), *r.sample(SPOTS, 2)
    gone = pick(
        r,
        f"One day {a.name} could not find {a.his} {short}.",
        f"{a.name} had {thing} and loved it very much. One morning it was gone.",
    )
    search = pick(
        r,
        f"{he_cap} looked {spot}, but the {short} was not there.",
        f'"Where is my {short}?" said {a.name}. {he_cap} looked {spot}, but found nothing.',
    )
    meeting = (
        f'Then {s.friend} came along. "Why are you crying?" asked {b.name}. "I have lost my {short}," said {a.name}. '
        f'"Do not be sad," said {b.name}. "I will help you."'
    )
    found = pick(
        r,
        f"They looked together all day. At last {b.name} found the {short} {other_spot}.",
        f"So the two went from place to place until they saw the {short} {other_spot}.",
    )
    return [
        f"{gone} {s.weather}",
        f"{search} {a.name} began to cry.",
        meeting,
        f"{found} {a.name} was very happy and thanked {b.name}.",
    ]


def plot_afraid(r: Random, s: Scene) -> list[str]:
    """A fear is overcome."""
    a, b = s.a, s.b
    fear = r.choice(["the dark", "thunder", "deep water", "the old bridge", "the big dog", "the noisy mill"])
    return [
        f"{a.name} was afraid of {fear}. {s.weather}",
        (
            f'One evening {s.friend} asked {a.name} to come out and play. "I cannot," said {a.name}. '
            f'"I am afraid of {fear}."'
        ),
        pick(
            r,
            f'"Take my hand," said {b.name}. "We will go slowly, and you will not be alone."',
            (
                f'{b.name} did not laugh. "I was afraid of {fear} too," {b.he} said, '
                '"but I learned that it cannot hurt me."'
            ),
        ),
        (
            f"So {a.name} took one small step, and then another. After a while {a.he} was not afraid any more. "
            f'"I did it!" said {a.name}, and {b.name} clapped.'
        ),
    ]


def plot_shared_food(r: Random, s: Scene) -> list[str]:
    """Food is shared, and the kindness returned."""
    a, b = s.a, s.b
    treat, other_treat = r.sample(TREATS, 2)
    return [
        f"One day {a.name} made {treat}. {s.weather}",
        (
            f"On the way to the market {a.he} met {s.friend}, who had not eaten since the day before. "
            f'"I am so hungry," said {b.name}.'
        ),
        pick(
            r,
            f"{a.name} looked at the {treat}. There was not very much, but {a.he} gave half of it to {b.name}.",
            f'"Then sit down with me," said {a.name}, and they ate the {treat} together.',
        ),
        (
            f"The next week the snow came, and {a.name} had nothing left to eat. There was a knock at the door. "
            f"It was {b.name} with a big basket of {other_treat}. "
            f'"You helped me, and now I will help you," said {b.name}.'
        ),
    ]


def plot_contest(r: Random, s: Scene) -> list[str]:
    """A race or contest that ends together."""
    a, b = s.a, s.b
    contest = r.choice(
        ["a race around the lake", "a singing contest", "a kite day", "a race up the hill", "a swimming race"]
    )
    return [
        f"One spring the animals held {contest}. {s.weather}",
        f'{a.name} practiced every day, but {s.friend} said, "You are too slow. You will never win."',
        pick(
            r,
            f"{a.name} did not answer. {cap(a.he)} only practiced harder.",
            f"{a.name} felt sad, but {a.he} did not give up.",
        ),
        (
            f"On the great day {b.name} was in front at first, but soon grew tired and fell down. "
            f"{a.name} could have won, but {a.he} stopped and helped {b.name} to stand up. "
            "They came to the end together, and everyone cheered."
        ),
    ]


def plot_building(r: Random, s: Scene) -> list[str]:
    """Something is built that was too hard for one."""
    a, b = s.a, s.b
    building = r.choice(
        ["a little house", "a boat", "a bridge over the stream", "a tree house", "a warm nest", "a swing"]
    )
    done = pick(
        r,
        f"The next day they worked together, and before the sun went down they had made {building}.",
        f"They sang while they worked, and in three days {building} stood there, strong and fine.",
    )
    return [
        f"{a.name} wanted to build {building}. {s.weather}",
        f"All day {a.he} carried wood and stones, but in the evening the wind blew everything down.",
        (
            f'"It is too hard for me," said {a.name}. Then {s.friend} said, "Two can carry more than one. '
            'Let us try again tomorrow."'
        ),
        f"{done} {a.name} was proud, and so was {b.name}.",
    ]


def plot_found(r: Random, s: Scene) -> list[str]:
    """Something is found and given back to its owner."""
    a, b, he_cap = s.a, s.b, cap(s.a.he)
    (thing, short), spot = r.choice(LOST), r.choice(SPOTS)
    return [
        f"One morning {a.name} found {thing} {spot}. {s.weather}",
        (
            f'"Somebody must have lost it," thought {a.name}. {he_cap} wanted to keep it, '
            f"but {a.he} knew that it was not {a.his} own."
        ),
        pick(
            r,
            (
                f'So {a.he} went from door to door and asked, "Is this your {short}?" '
                f"At the last house lived {s.friend}."
            ),
            f"{he_cap} walked a long way and asked everyone about the {short}. At last {a.he} came to {s.friend}.",
        ),
        (
            f'"Oh, my {short}!" cried {b.name}. "I thought I would never see it again. Thank you, {a.name}!" '
            f"And {b.name} gave {a.name} some {r.choice(TREATS)} for the way home."
        ),
    ]


PLOTS: tuple[Callable[[Random, Scene], list[str]], ...] = (
    plot_lost,
    plot_afraid,
    plot_shared_food,
    plot_contest,
    plot_building,
    plot_found,
)


def story(r: Random, animal: str | None = None, name: str | None = None) -> str:
    """A story about a random hero, or about the given animal and name."""
    a, b = hero(r, animal, name), hero(r)
    while b.name == a.name or b.animal == a.animal:
        b = hero(r)
    home, weather = r.choice(HOMES), r.choice(WEATHER)
    kind_of_a = with_article(a.trait) + " " + a.animal
    start = pick(
        r,
        f"Once upon a time there was {kind_of_a} named {a.name}. {a.name} lived {home}.",
        f"Once there lived {home} {kind_of_a} whose name was {a.name}.",
        f"Long ago, {home}, there lived {kind_of_a}. Everyone called {a.him} {a.name}.",
    )
    friend = pick(
        r,
        f"{b.name} the {b.animal}",
        f"{with_article(b.trait)} {b.animal} named {b.name}",
        f"{a.his} friend {b.name} the {b.animal}",
    )
    end = pick(
        r,
        f"From that day on, {a.name} and {b.name} were the best of friends.",
        f"And {a.name} and {b.name} played together every day after that.",
        f"{a.name} and {b.name} laughed and walked home together.",
        f"That night {a.name} slept well and dreamed of {b.name}.",
    )
    lesson = r.choice(LESSONS)
    plot = r.choice(PLOTS)
    body = plot(r, Scene(a=a, b=b, friend=friend, weather=weather))
    tail = end + (f" {lesson}" if r.random() < 0.5 else "")
    separator = r.choice([" ", "\n\n"])
    return separator.join([start, *body, tail])
