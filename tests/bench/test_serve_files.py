"""The serving benchmark's prompts from files: what is loaded, what is skipped with a warning, and what is rejected."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from antiphon.bench.serve.workload import Ask, Workload, make_asks
from antiphon.core.errors import OptionError
from tests.support.errors import raises

QUESTION, ANSWER = "question " * 10, "answers " * 20
TALK = {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}
SHORT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": ANSWER}]}


def sharegpt(folder: Path, entries: Any) -> Workload:
    (folder / "talks.json").write_text(json.dumps(entries), encoding="utf-8")
    return Workload(dataset="sharegpt", path=folder / "talks.json", num_prompts=3)


def custom(folder: Path, text: str) -> Workload:
    (folder / "lines.jsonl").write_text(text, encoding="utf-8", newline="")
    return Workload(dataset="custom", path=folder / "lines.jsonl", num_prompts=2, output_len=4)


def test_conversations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert make_asks(sharegpt(tmp_path, [TALK, SHORT])) == [Ask(prompt=QUESTION, max_tokens=40)] * 3
    assert not caplog.records, "short ones are left out as always, which the page says"
    workload = replace(sharegpt(tmp_path, [TALK]), file_output_len=7)
    assert make_asks(workload) == [Ask(prompt=QUESTION, max_tokens=7)] * 3


def with_values(question: Any, answer: Any) -> dict[str, Any]:
    return {"conversations": [{"value": question}, {"value": answer}]}


ODD = [
    (None, "has no list of conversations"),
    (3, "has no list of conversations"),
    ("conversations", "has no list of conversations"),
    ([TALK], "has no list of conversations"),
    ({}, "has no list of conversations"),
    ({"conversations": None}, "has no list of conversations"),
    ({"conversations": {"0": 1}}, "has no list of conversations"),
    ({"conversations": []}, "has fewer than two turns"),
    ({"conversations": [{"value": QUESTION}]}, "has fewer than two turns"),
    ({"conversations": [None, {"value": ANSWER}]}, "has no text as value of its first turn"),
    ({"conversations": [{"value": QUESTION}, {"from": "gpt"}]}, "has no text as value of its second turn"),
    ({"conversations": [{"value": QUESTION}, QUESTION]}, "has no text as value of its second turn"),
    (with_values(None, ANSWER), "has no text as value of its first turn"),
    (with_values(QUESTION, 10**30), "has no text as value of its second turn"),
    (with_values([QUESTION], ANSWER), "has no text as value of its first turn"),
    (with_values(QUESTION + "\ud83d", ANSWER), "has half a character in its first turn"),
    (with_values(QUESTION, "\udc00" + ANSWER), "has half a character in its second turn"),
]


@pytest.mark.parametrize(("entry", "reason"), ODD)
def test_an_odd_entry_is_skipped_and_told(
    entry: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert make_asks(sharegpt(tmp_path, [TALK, entry, TALK])) == [Ask(prompt=QUESTION, max_tokens=40)] * 3
    (record,) = caplog.records
    told = record.getMessage()
    assert record.levelno == logging.WARNING and "talks.json" in told
    assert "1 of 3 entries are not conversations" in told and f"the first: entry 2 {reason}" in told


def test_all_odd_entries_are_counted_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workload = sharegpt(tmp_path, [TALK, *[entry for entry, _ in ODD], SHORT])
    assert len(make_asks(workload, 2)) == 5
    (record,) = caplog.records
    assert f"{len(ODD)} of {len(ODD) + 2} entries" in record.getMessage() and "entry 2 " in record.getMessage()


@pytest.mark.parametrize(
    ("entries", "facts"),
    [
        ([None, {}], ["2 of 2 entries are not conversations", "the first: entry 1 has no list", "0 are too short"]),
        ([SHORT, 5], ["1 of 2 entries", "the first: entry 2", "1 are too short or too long"]),
        ([], ["0 of 0 entries"]),
        ({"a": TALK}, ["JSON list"]),
        (7, ["JSON list"]),
    ],
)
def test_a_file_without_a_conversation_is_refused(
    entries: Any, facts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with raises(OptionError, "talks.json", *facts, option="dataset-path") as refused:
        make_asks(sharegpt(tmp_path, entries))
    assert refused.error.remedy and not caplog.records


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"1" * 5000], ids=range(4))
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "talks.json").write_bytes(content)
    with raises(OptionError, "talks.json", option="dataset-path") as refused:
        make_asks(Workload(dataset="sharegpt", path=tmp_path / "talks.json"))
    assert refused.error.limit and refused.error.remedy
    with raises(OptionError, "none.json", option="dataset-path", remedy="UTF-8"):
        make_asks(Workload(dataset="sharegpt", path=tmp_path / "none.json"))


def test_own_lines(tmp_path: Path) -> None:
    lines = [{"prompt": "one"}, {"prompt": [1, 2], "output_tokens": 9}, {"prompt": "x", "output_tokens": None}]
    workload = replace(custom(tmp_path, "\n\n".join(map(json.dumps, lines))), num_prompts=3)
    asks = [Ask(prompt="one", max_tokens=4), Ask(prompt=[1, 2], max_tokens=9), Ask(prompt="x", max_tokens=4)]
    assert make_asks(workload) == asks
    assert [ask.max_tokens for ask in make_asks(replace(workload, file_output_len=3))] == [3, 3, 3]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_prompt_may_hold_what_ends_lines_elsewhere(tmp_path: Path, end: str) -> None:
    prompts = ["a\u2028b\u2029", "c\x85d"]
    lines = end.join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    assert [ask.prompt for ask in make_asks(custom(tmp_path, "\ufeff" + lines))] == prompts
    talks = [with_values(QUESTION + "\u2028\x85", ANSWER)]
    (tmp_path / "talks.json").write_text(json.dumps(talks, ensure_ascii=False), encoding="utf-8")
    (ask,) = make_asks(Workload(dataset="sharegpt", path=tmp_path / "talks.json", num_prompts=1))
    assert ask.prompt == QUESTION + "\u2028\x85"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x", "column 1"),
        ('{"prompt": "a"', "JSON"),
        pytest.param("[" * 100_000, "JSON", id="too deep"),
        ("\u2028", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ("{}", '"prompt"'),
        ('{"prompt": null}', '"prompt"'),
        ('{"prompt": ""}', '"prompt"'),
        ('{"prompt": []}', '"prompt"'),
        ('{"prompt": 5}', '"prompt"'),
        ('{"prompt": ["a"]}', '"prompt"'),
        ('{"prompt": [true]}', '"prompt"'),
        ('{"prompt": [-1]}', '"prompt"'),
        ('{"prompt": "a\\ud83d"}', "character"),
        ('{"prompt": "a", "output_tokens": -1}', '"output_tokens"'),
        ('{"prompt": "a", "output_tokens": 1e999}', '"output_tokens"'),
        ('{"prompt": "a", "output_tokens": "b"}', '"output_tokens"'),
    ],
)
def test_a_wrong_line_of_ones_own_is_named(line: str, reason: str, tmp_path: Path) -> None:
    workload = custom(tmp_path, '{"prompt": "one"}\r\n\r\n' + line + '\r\n{"prompt": "two"}\r\n')
    with raises(OptionError, "lines.jsonl", "line 3 ", reason, option="dataset-path", remedy='"prompt"'):
        make_asks(workload)


@pytest.mark.parametrize("text", ["", "\r\n\r\n", " \n"])
def test_no_line_of_ones_own_is_refused(text: str, tmp_path: Path) -> None:
    with raises(OptionError, "lines.jsonl", option="dataset-path", remedy="prompt"):
        make_asks(custom(tmp_path, text))
