"""Names, things and small helpers that the word problems and the stories are filled with.

The order and number of the words in each list are part of the corpus: a random choice is an index into the list.

The letters mean the same in every word-problem template:

    r             the random generator, drawn from in the order of the code
    n; m, p       name of the first person; of the second and third, in templates with several people
    he, his       pronouns of the person just named
    o, f          what is counted, in the plural; a group of people
    b, bs         a container and its plural
    g, gs, h, hs  goods and their plural; other goods and their plural
    j, v, w       words that vary the wording
    q, steps      the question; the sentences of the answer, one for each step of reasoning

Any other letter, and one of these where the template has no such person or thing, is a number of the problem.
"""

from collections.abc import Hashable
from random import Random

Drawn = tuple[str, list[str], int, tuple[Hashable, ...]]
"""What a template returns: question, steps of the answer, result, and the names and numbers the problem is made of."""

Person = tuple[str, str, str, str]
"""Name, and the pronouns "she", "her", "her" or "he", "his", "him"."""


def word_list(text: str) -> tuple[str, ...]:
    """The words of `text`, in order."""
    return tuple(text.split())


GIRLS = word_list("""
    Anna Mary Lily Emma Sara Julia Nina Rosa Clara Ella Maya Grace Hannah Lucy Alice Ruby Zoe Ivy Nora Leah
    Olivia Sophie Mia Eva Amy Kate Jane Betty Helen Carla Dina Fatima Priya Mei Yuki Amina Tina Laura Vera Paula
""")
BOYS = word_list("""
    Tom Ben Sam Jack Leo Max Noah Liam Adam Peter Paul Mark John James Oscar Henry Felix Hugo Ivan Omar
    Ravi Chen Kenji Diego Carlos Luis Eric Alan Brian David Frank George Kevin Martin Nathan Oliver Ryan Simon
    Victor Walter
""")
THINGS = (
    *word_list("""
        apples oranges pears peaches lemons plums cherries strawberries tomatoes potatoes carrots onions
        cookies muffins cupcakes candies walnuts acorns eggs marbles stickers pencils pens crayons books comics
        stamps coins shells stones balloons flowers roses tulips cards beads buttons ribbons postcards badges blocks
        puzzles photos keys feathers bottles cups plates kites hats
    """),
    "toy cars",
    "toy boats",
    "paper stars",
    "tennis balls",
)
FOOD = word_list("""
    apples oranges pears peaches plums cherries strawberries cookies muffins cupcakes candies walnuts
    carrots tomatoes
""")
BOXES = (
    ("box", "boxes"),
    ("bag", "bags"),
    ("basket", "baskets"),
    ("jar", "jars"),
    ("crate", "crates"),
    ("packet", "packets"),
    ("tray", "trays"),
    ("bucket", "buckets"),
    ("drawer", "drawers"),
    ("tin", "tins"),
)
GOODS = (
    ("notebook", "notebooks"),
    ("pen", "pens"),
    ("ruler", "rulers"),
    ("cup", "cups"),
    ("plate", "plates"),
    ("sandwich", "sandwiches"),
    ("cake", "cakes"),
    ("pie", "pies"),
    ("juice", "juices"),
    ("ticket", "tickets"),
    ("toy", "toys"),
    ("ball", "balls"),
    ("scarf", "scarves"),
    ("hat", "hats"),
    ("shirt", "shirts"),
    ("lamp", "lamps"),
    ("plant", "plants"),
    ("book", "books"),
    ("puzzle", "puzzles"),
    ("candle", "candles"),
)
PLACES = word_list("farm school library bakery garden market museum park shop village")
JOBS = (
    "washing cars",
    "walking dogs",
    "painting fences",
    "cutting grass",
    "baking bread",
    "delivering papers",
    "picking fruit",
    "cleaning windows",
    "teaching music",
    "fixing bikes",
)
FRIENDS = word_list("friends children cousins neighbors classmates students")
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


def person(r: Random) -> Person:
    """A girl or a boy, with equal chances."""
    if r.random() < 0.5:
        return r.choice(GIRLS), "she", "her", "her"
    return r.choice(BOYS), "he", "his", "him"


def people(r: Random, num_people: int) -> list[Person]:
    """`num_people` people with different names."""
    out: list[Person] = []
    while len(out) < num_people:
        p = person(r)
        if all(p[0] != q[0] for q in out):
            out.append(p)
    return out


def pick(r: Random, *options: str) -> str:
    """One of the wordings. All of them are evaluated first, so what they draw from `r` comes before the choice."""
    return r.choice(options)


def cap(text: str) -> str:
    """`text` with its first letter in upper case and the rest as it is."""
    return text[0].upper() + text[1:]


def with_article(text: str) -> str:
    """`text` after "a" or "an"."""
    return ("an " if text[0] in "aeiou" else "a ") + text
