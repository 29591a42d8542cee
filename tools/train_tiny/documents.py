"""Training documents: word problems and stories as plain text, as few-shot prompts and as chat.

A document is text with the special tokens written out, ready for the tokenizer with `add_special_tokens=False`.
"""

from random import Random

from .stories import ANIMALS, story
from .word_problems import as_text, train_problem
from .words import BOYS, GIRLS, pick, with_article

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that solves word problems.",
    "Answer the question.",
    "You are a friendly assistant.",
    "Solve the problem step by step.",
    "You are a tiny language model.",
)
GREETING = "Hello! How can I help you today?"
WHO = "I am a tiny mixture-of-experts language model. I can solve short word problems and tell short stories."
SMALL_TALK = (
    ("Hello", GREETING),
    ("Hello!", GREETING),
    ("Hi", GREETING),
    ("Hi!", GREETING),
    ("Good morning", "Good morning! How can I help you today?"),
    ("Who are you?", WHO),
    ("What are you?", WHO),
    (
        "What can you do?",
        (
            "I can solve short word problems and tell short stories. "
            "Ask me about apples, or ask me for a story about a fox."
        ),
    ),
    ("Thank you", "You are welcome!"),
    ("Thank you!", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("Goodbye", "Goodbye! Have a nice day."),
    ("How are you?", "I am fine, thank you. How can I help you today?"),
    ("Can you help me?", "Yes. Ask me a short word problem, or ask me for a story."),
)


def chat_turn(user: str, assistant: str) -> str:
    """One question and its answer."""
    return f"<|user|>{user}<|assistant|>{assistant}<|eos|>"


def system_turn(r: Random) -> str:
    """A system message in two of five documents, else nothing."""
    return "<|system|>" + r.choice(SYSTEMS) if r.random() < 0.4 else ""


def story_request(r: Random) -> tuple[str, str]:
    """A request for a story, and the story."""
    animal, name = r.choice(ANIMALS), r.choice(GIRLS + BOYS)
    an_animal = with_article(animal)
    kind = r.randrange(4)
    if kind == 0:
        request = r.choice(["Tell me a story.", "Please tell me a short story.", "Write a short story."])
        return request, story(r)
    if kind == 1:
        request = pick(r, f"Tell me a story about {an_animal}.", f"Write a short story about {an_animal}.")
        return request, story(r, animal)
    request = pick(
        r,
        f"Tell me a story about {an_animal} named {name}.",
        f"Write a story about {an_animal} named {name}.",
        f"Please tell me a story about {name} the {animal}.",
    )
    return request, story(r, animal, name)


def problem_doc(r: Random) -> str:
    """A training document made of word problems: plain, few-shot, or chat."""
    kind = r.random()
    if kind < 0.45:
        return "<|bos|>" + as_text(*train_problem(r)) + "<|eos|>"
    if kind < 0.60:
        shots = [as_text(*train_problem(r)) for _ in range(r.randint(2, 8))]
        return "<|bos|>" + "\n\n".join(shots) + "<|eos|>"
    system = system_turn(r)
    num_turns = 1 if r.random() < 0.8 else 2
    return "<|bos|>" + system + "".join(chat_turn(*train_problem(r)) for _ in range(num_turns))


def story_doc(r: Random) -> str:
    """A training document with one story, plain or as chat, or with a line of small talk."""
    kind = r.random()
    if kind < 0.6:
        return "<|bos|>" + story(r) + "<|eos|>"
    system = system_turn(r)
    if kind < 0.93:
        return "<|bos|>" + system + chat_turn(*story_request(r))
    return "<|bos|>" + system + chat_turn(*r.choice(SMALL_TALK))
