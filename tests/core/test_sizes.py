"""Sizes as people type them mean what vLLM and the GNU tools make of them."""

from __future__ import annotations

import pytest

from antiphon.core.errors import OptionError
from antiphon.core.sizes import parse_size
from tests.support.errors import raises


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("32768", 32768),
        ("32_768", 32768),
        ("1k", 1000),
        ("1K", 1024),
        ("25.6k", 25600),
        ("32k", 32000),
        ("32K", 32768),
        (" 2m ", 2_000_000),
        ("2M", 2 * 2**20),
        ("1.5K", 1536),
        ("0.001k", 1),
        ("3g", 3 * 10**9),
        ("3G", 3 * 2**30),
        ("1T", 2**40),
        ("-5", -5),
        ("0", 0),
        (7, 7),
    ],
)
def test_a_count(text: str | int, number: int) -> None:
    assert parse_size(text) == parse_size(text, of_bytes=True) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("20GiB", 20 * 2**30),
        ("20G", 20 * 2**30),
        ("20GB", 20 * 10**9),
        ("20g", 20 * 10**9),
        ("4kB", 4000),
        ("4KB", 4000),
        ("4KiB", 4096),
        ("4kib", 4096),
        ("0.5MiB", 2**19),
    ],
)
def test_bytes(text: str, number: int) -> None:
    assert parse_size(text, of_bytes=True) == number


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        *((text, []) for text in ("32,768", "32kk", "k", "", "1.5", "-1k", "1e3", "20GiB", "9" * 5000 + "k", "auto")),
        ("25.6K", ["26214.4"]),
        ("1.2345k", ["1234.5"]),
    ],
)
def test_what_is_no_count_is_told_with_examples(text: str, figures: list[str]) -> None:
    with raises(OptionError, f"max_model_len={text!r}", *figures, option="max_model_len", value=text, remedy="32K"):
        parse_size(text, "max_model_len")


def test_what_is_no_number_of_bytes_is_told_with_examples() -> None:
    with raises(OptionError, "'20 G'", value="20 G", remedy="20GiB"):
        parse_size("20 G", of_bytes=True)
