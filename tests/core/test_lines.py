"""Lines end at LF, CR LF and CR only, and what we write is one line for every reader."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.core.errors import first_line
from antiphon.core.lines import JSON_ESCAPES, escape_json_lines, json_lines, one_line, split_lines

ROOT = Path(__file__).parents[2]
ENDS_FOR_SOME = [chr(code) for code in range(sys.maxunicode) if len(f"a{chr(code)}b".splitlines()) > 1]
TEXTS = st.text(st.sampled_from(["\r", "\n", "a", "é", "😀", *ENDS_FOR_SOME]))


def test_python_knows_the_line_ends_that_we_know() -> None:
    assert {"\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"} == set(ENDS_FOR_SOME)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\nb\r\nc\rd", ["a", "b", "c", "d"]),
        ("a\n", ["a"]),
        ("a\r\n\r\n", ["a", ""]),
        ("\r\r\n\n", ["", "", ""]),
        ("a\u2028b\x85c\fd\ve\x1cf\x1dg\x1eh\u2029\n i", ["a\u2028b\x85c\fd\ve\x1cf\x1dg\x1eh\u2029", " i"]),
    ],
)
def test_a_line_ends_at_lf_cr_lf_and_cr_only(text: str, lines: list[str]) -> None:
    assert split_lines(text) == lines


@given(TEXTS)
def test_lines_are_those_of_a_text_file(text: str) -> None:
    assert split_lines(text) == [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


@given(TEXTS)
def test_one_line_is_one_for_every_reader(text: str) -> None:
    told = one_line(text)
    assert len(told.splitlines()) <= 1 and told.replace(" ", "") == "".join(text.splitlines())


@given(TEXTS)
def test_json_is_one_line_for_every_reader_and_means_the_same(text: str) -> None:
    plain = json.dumps({text: [text]}, ensure_ascii=False)
    escaped = escape_json_lines(plain.encode())
    assert escaped.decode() == plain.translate(JSON_ESCAPES)
    assert len(escaped.decode().splitlines()) == 1 and json.loads(escaped) == {text: [text]}


def test_json_without_line_ends_is_as_it_was() -> None:
    for text in ("", "plain", "déjà", "«x»", "it\u2019s", "\u2026", "日本", "😀", "\x84\x86\u2027\u202a"):
        encoded = json.dumps(text, ensure_ascii=False).encode()
        assert escape_json_lines(encoded) == encoded


def test_lines_of_json_are_numbered_as_an_editor_does() -> None:
    text = '{"a": "x\u2028y"}\r\n\n \t\r[1]\r\n"\x85"'
    assert list(json_lines(text)) == [(1, {"a": "x\u2028y"}), (4, [1]), (5, "\x85")]
    assert list(json_lines("\n\n")) == []


@pytest.mark.parametrize("wrong", ["{", "\u2028", "[1] 2", "1" * 5000, "[" * 100_000], ids=range(5))
def test_a_line_that_is_no_json_is_named(wrong: str) -> None:
    rows = json_lines(f"1\n\n{wrong}\n2", "a number")
    assert next(rows) == (1, 1)
    with pytest.raises(ValueError, match=r"^line 3 .*a number \(.+\)$"):
        next(rows)


def test_the_first_line_of_an_error_that_is_quoted() -> None:
    assert first_line(ValueError("\n the file a\u2028b is gone \nadvice")) == "the file a\u2028b is gone"
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"


def test_nobody_splits_lines_another_way() -> None:
    files = [path for folder in ("antiphon", "tools", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    others = {"splitlines", "iter_lines", "aiter_lines"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in others
    ]
    assert not found, "use antiphon.core.lines.split_lines, or antiphon.bench.serve.event_stream"
