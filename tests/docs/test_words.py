"""The words of the house: the field's own, spelled the American way, in whole sentences."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOG = ROOT / "docs/log.md"  # history stays as it was written
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path != LOG] + [ROOT / "README.md"]
MODULES = sorted((ROOT / "antiphon").rglob("*.py"))

BETTER = {
    r"\bin vain\b": "timed out",
    r"(?<!streaming )\bmultiprocessors?\b": "SM",
    r"\bmatrix products?\b": "GEMM",
    r"\bnonsense\b": "say what is wrong",
    r"\bsettl(e|es|ed|ing)\b": "resolve",
    r"\w*(quanti|tokeni|initiali|speciali|normali|seriali|synchroni|recogni|organi)s(e|es|ed|ing|ation)\b": "-ize",
    r"\b(behaviour|neighbour|colour|favour|honour)\w*": "-or",
}
"""Home-made or British words, and what to write instead."""

_ENDS = (".", "?", "!", ":", "`", "|", ")", ";", ",")


def sentences(path: Path) -> list[tuple[int, str]]:
    """Every docstring, also of constants, with its line."""
    return [
        (node.lineno, node.value.value.strip())
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_of_the_field_are_used(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        for wrong, better in BETTER.items():
            found = re.search(wrong, line, flags=re.IGNORECASE)
            assert not found, f"{path.name}:{number} has {found and found[0]!r}; {better}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_whole_sentences(path: Path) -> None:
    """The first paragraph is complete: it ends with a period or opens a list, and does not begin with "Of ..."."""
    for number, text in sentences(path):
        first = text.partition("\n\n")[0]
        assert first.endswith(_ENDS), f"{path.name}:{number} does not end: {first[-60:]!r}"
        assert not first.startswith("Of "), f"{path.name}:{number} dangles: {first[:60]!r}"


@pytest.mark.parametrize(
    "wrong", ["in vain", "a multiprocessor", "settled", "dequantised", "neighbouring", "tokenises"]
)
def test_the_search_finds_them(wrong: str) -> None:
    assert any(re.search(pattern, wrong, flags=re.IGNORECASE) for pattern in BETTER)
