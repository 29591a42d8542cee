"""Public-domain English fiction: which books, how they are cleaned, and the passages held out from them.

The books are read from a checkout of a public GitHub repository with one folder for each author. A book is
(title, [paragraph, ...]); a paragraph is one line of printable ASCII.
"""

import re
import subprocess
from pathlib import Path

Book = tuple[str, list[str]]

BOOKS_REPO = "https://github.com/mlschmitt/classic-books-markdown"
BOOKS_COMMIT = "944882722e9a96fa6cf2739dc2ea757e101f412f"
# English-language authors who died before 1955, and two collections of tales in 19th-century translations.
BOOK_AUTHORS = [
    name.strip()
    for name in """
L. Frank Baum; Lucy Maud Montgomery; Louisa May Alcott; Frances Hodgson Burnett; Edith Nesbit; Lewis Carroll;
Kenneth Grahame; J. M. Barrie; Anna Sewell; George MacDonald; Howard Pyle; Horatio Alger; The Brothers Grimm;
Hans Christian Andersen; Oscar Wilde; Mark Twain; Arthur Conan Doyle; Robert Louis Stevenson; Rudyard Kipling;
Jack London; H.G. Wells; Jane Austen; Charles Dickens; Jerome K. Jerome; R.M. Ballantyne; Charlotte Bronte;
Anne Bronte; Emily Bronte; Elizabeth Gaskell; George Eliot; Anthony Trollope; Wilkie Collins; Thomas Hardy;
Edgar Rice Burroughs; Willa Cather; Zane Grey; G.K. Chesterton; Edith Wharton; Anthony Hope; H. Rider Haggard;
Emma Orczy; Grace Livingston Hill; Bram Stoker; Nathaniel Hawthorne; Booth Tarkington; Rafael Sabatini; John Buchan;
Washington Irving; Harriet Beecher Stowe; Joseph Conrad; Mary Wollstonecraft Shelley; Frank Norris; Stephen Crane;
Anna Katharine Green; J. Meade Falkner; Max Brand; William Makepeace Thackeray; R.D. Blackmore
""".replace("\n", " ").split(";")
]
BOOKS_SKIPPED = {"An Ideal Husband", "The Importance of Being Earnest"}  # plays
LAST_YEAR = 1928
MIN_BOOK_CHARS = 10_000

HELD_OUT_EVERY = 4  # books
HELD_OUT_PASSAGE_CHARS = 2500
HELD_OUT_TOTAL_CHARS = 102_000

ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2014": "--",
        "\u2013": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u00e6": "ae",
        "\u0153": "oe",
        "\u00e9": "e",
        "\u00e8": "e",
        "\u00ea": "e",
        "\u00e0": "a",
        "\u00e2": "a",
        "\u00e7": "c",
        "\u00ef": "i",
        "\u00ee": "i",
        "\u00f4": "o",
        "\u00fb": "u",
        "\u00fc": "u",
        "\u00f6": "o",
        "\u00e4": "a",
        "\u00a3": "L",
    }
)


def clone_books(folder: Path) -> None:
    """Clone the books into `folder`, at the commit that the model was trained on, unless the folder exists."""
    if not folder.exists():
        subprocess.run(["git", "clone", "--quiet", BOOKS_REPO, str(folder)], check=True)
        subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", BOOKS_COMMIT], check=True)


def clean_paragraphs(text: str) -> list[str]:
    """The paragraphs of a book's Markdown that are plain prose, without its head, headings and marks of emphasis."""
    text = text.split("-------", 1)[-1].translate(ASCII).replace("_", "").replace("*", "")
    paragraphs = []
    for p in re.split(r"\n\s*\n", text):
        p = " ".join(p.split())
        if not p or p.startswith("#") or p.isupper() or len(p) < 2 or re.search(r"Gutenberg|[^\x20-\x7e]", p):
            continue
        if sum(c.isalpha() or c == " " for c in p) < 0.85 * len(p):
            continue
        paragraphs.append(p)
    return paragraphs


def read_books(root: Path) -> list[Book]:
    """The chosen books of a checkout, by author in the order of BOOK_AUTHORS and then by file name."""
    books = []
    for author in BOOK_AUTHORS:
        for path in sorted((root / author).glob("*.md")):
            title = path.stem.strip()
            text = path.read_text(encoding="utf-8", errors="ignore")
            year = re.search(r"^## Year: *(\d{4})", text, re.M)
            if title in BOOKS_SKIPPED or (year and int(year.group(1)) > LAST_YEAR):
                continue
            paragraphs = clean_paragraphs(text)
            if sum(map(len, paragraphs)) > MIN_BOOK_CHARS:
                books.append((f"{author}, {title}", paragraphs))
    if not books:
        raise FileNotFoundError(
            f"found none of the chosen books in {root}; it must be a checkout of {BOOKS_REPO}, with a folder for "
            "each author. Give one with --books, or leave --books out to have it cloned"
        )
    return books


def hold_out(books: list[Book]) -> tuple[list[Book], list[Book]]:
    """Cut a passage out of the middle of every 4th book: (parts to train on, held-out passages).

    The paragraphs on both sides of a passage are dropped. A book that lost a passage makes two parts of one title.
    """
    train: list[Book] = []
    held: list[Book] = []
    num_held_chars = 0
    for i, (title, paragraphs) in enumerate(books):
        if i % HELD_OUT_EVERY == 0 and num_held_chars < HELD_OUT_TOTAL_CHARS and len(paragraphs) > 60:
            begin = end = len(paragraphs) // 2
            num_chars = 0
            while num_chars < HELD_OUT_PASSAGE_CHARS and end < len(paragraphs) - 2:
                num_chars += len(paragraphs[end])
                end += 1
            held.append((title, paragraphs[begin:end]))
            num_held_chars += num_chars
            train += [(title, paragraphs[: begin - 1]), (title, paragraphs[end + 1 :])]
        else:
            train.append((title, paragraphs))
    return train, held
