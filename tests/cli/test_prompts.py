"""`antiphon generate` reads prompts files and writes JSON lines; what a line is, is the same everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from antiphon import cli
from antiphon.core.sampling import CompletionOutput, GeneratedOutput

ODD = "a\u2028b\x85c\u2029d"
NOT_IN_TEXT = "\f\v\x1c\x1d\x1e"  # and these, which JSON escapes


class Echo:
    """An engine that says what it is asked."""

    def generate(self, prompts: list[Any], params: list[Any], progress: Any) -> list[GeneratedOutput]:
        return [GeneratedOutput(prompt=prompt, prompt_token_ids=[], outputs=[output(prompt)]) for prompt in prompts]

    def chat_prompt(self, messages: list[Any], **settings: Any) -> str:
        return json.dumps([messages, settings])

    def stats(self) -> Any:
        return SimpleNamespace(to_dict=dict)


def output(text: str) -> CompletionOutput:
    return CompletionOutput(index=0, text=text, token_ids=[], finish_reason="stop")


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def started(*_: Any) -> Iterator[Echo]:
        yield Echo()

    monkeypatch.setattr("antiphon.cli.generate.started", started)


def generate(monkeypatch: pytest.MonkeyPatch, file: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["antiphon", "generate", "--prompts-file", str(file), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def prompts_of(out: str) -> list[Any]:
    """Split as the least careful reader does."""
    *rows, last = map(json.loads, out.splitlines())
    assert last == {"stats": {}} and all(row["text"] == row["prompt"] for row in rows)
    return [row["prompt"] for row in rows]


@pytest.mark.usefixtures("echo")
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_lines_of_a_prompts_file(
    end: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [ODD + NOT_IN_TEXT, " two ", "three"]
    lines = [json.dumps({"prompt": one}, ensure_ascii=False) for one in prompts] if suffix == "jsonl" else prompts
    for text in (end.join(lines), "\ufeff" + 2 * end + (2 * end).join(lines) + end):
        (tmp_path / f"prompts.{suffix}").write_text(text, encoding="utf-8", newline="")
        assert generate(monkeypatch, tmp_path / f"prompts.{suffix}") == 0
        assert prompts_of(capsys.readouterr().out) == prompts


@pytest.mark.parametrize("wrong", ["\u2028", "1" * 5000, "[" * 100_000, '{"prompt": null}'], ids=range(4))
def test_a_line_that_python_cannot_read_is_named_too(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "{ODD}"}}\n\n{wrong}\n', encoding="utf-8")
    assert generate(monkeypatch, tmp_path / "prompts.jsonl") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --prompts-file ") and 'line 3 is not a JSON object with a text "prompt"' in told
    assert len(told.splitlines()) == 1


# ---- chats

SAID = {"chat_template_kwargs": {}, "continue_final_message": False, "add_generation_prompt": None}


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["antiphon", "generate", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.usefixtures("echo")
def test_a_prompt_as_what_a_user_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(monkeypatch, "--chat", "--prompt", "Hello", "--json") == 0
    (row, _) = map(json.loads, capsys.readouterr().out.split("\n")[:2])
    assert json.loads(row["prompt"]) == [[{"role": "user", "content": "Hello"}], SAID]
    stats: dict[str, Any] = {"steps": 1, "steps_by_plan": {}, "serial_reasons": {}, "overlap": {}, "transport": "local"}
    stats |= {"graphs": {"replayed": 0, "padded": 0, "eager_reasons": {}}, "synchronous_reasons": {}}
    monkeypatch.setattr(Echo, "stats", lambda self: stats)
    words = (
        "--chat-template-kwargs",
        '{"enable_thinking": false}',
        "--continue-final-message",
        "--no-add-generation-prompt",
    )
    assert asked(monkeypatch, "--chat", "--prompt", "Hello", *words) == 0
    settings = {"chat_template_kwargs": {"enable_thinking": False}, "continue_final_message": True}
    settings["add_generation_prompt"] = False
    answer = json.dumps([[{"role": "user", "content": "Hello"}], settings])
    assert capsys.readouterr().out == f"{answer}\n\n", "of a chat only the answer is shown"


@pytest.mark.usefixtures("echo")
def test_messages_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside plain prompts, which stay what they are."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    rows = [{"messages": messages}, {"prompt": "Once"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert generate(monkeypatch, tmp_path / "prompts.jsonl") == 0
    first, second = prompts_of(capsys.readouterr().out)
    assert json.loads(first) == [messages, SAID] and second == "Once"


@pytest.mark.parametrize(
    ("words", "rows", "told"),
    [
        (["--chat"], [{"prompt": [1, 2]}], "--chat takes texts and messages, but a prompt has token ids"),
        ([], [{"prompt": "a", "messages": [{}]}], "line 1 has a prompt and messages; leave one of them out"),
        ([], [{"messages": []}], "line 1 is not a JSON object with"),
        (["--continue-final-message"], [{"prompt": "a"}], "are for chats; add --chat"),
        (["--no-add-generation-prompt"], [{"prompt": "a"}], "--add-generation-prompt are for chats; add --chat"),
        (["--chat", "--chat-template-kwargs", "5"], [{"prompt": "a"}], "'5' is not a JSON object; use one such as"),
        (["--chat", "--chat-template-kwargs", "{"], [{"prompt": "a"}], "'{' is not a JSON object; use one such as"),
    ],
)
def test_chats_that_cannot_be(
    words: list[str],
    rows: list[Any],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert asked(monkeypatch, "--prompts-file", str(tmp_path / "prompts.jsonl"), *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and len(error.splitlines()) == 1
