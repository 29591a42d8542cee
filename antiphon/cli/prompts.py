"""Prompts of the command line: texts, files of texts, and chats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antiphon.core.errors import OptionError
from antiphon.core.lines import json_lines, split_lines

if TYPE_CHECKING:
    from antiphon.frontend.llm import LLM

_PROMPT_LINE = 'a JSON object with a text "prompt", or one of token ids, or with "messages"'


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, which the chat template turns into a prompt."""

    messages: list[dict[str, Any]]


Prompt = str | list[int] | Chat


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt per line, or one object per line of a `.jsonl` file. Raises `OptionError` naming a wrong line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"--prompts-file {path} cannot be read",
            limit=str(error),
            remedy="pass a text file in UTF-8",
            option="prompts-file",
        ) from error
    prompts: list[Prompt]
    if path.suffix == ".jsonl":
        prompts = _prompts_of_objects(text, path)
    else:
        prompts = [line for line in split_lines(text) if line.strip()]
    if not prompts:
        raise OptionError(f"--prompts-file {path} holds no prompt", remedy="write one per line", option="prompts-file")
    return prompts


def _prompts_of_objects(text: str, path: Path) -> list[Prompt]:
    try:
        return [_prompt_of(row, number) for number, row in json_lines(text, _PROMPT_LINE)]
    except ValueError as error:
        raise OptionError(f"--prompts-file {path}, {error}", option="prompts-file") from error


def _prompt_of(row: Any, number: int) -> Prompt:
    row = row if isinstance(row, dict) else {}
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is not None and messages is not None:
        raise ValueError(f"line {number} has a prompt and messages; leave one of them out")
    if isinstance(messages, list) and messages:
        return Chat(messages)
    if isinstance(prompt, str) or (prompt and isinstance(prompt, list)):
        return prompt
    raise ValueError(f"line {number} is not {_PROMPT_LINE}")


def as_chats(prompts: Sequence[Prompt]) -> list[Chat]:
    """Turn each text into a user message. Raises `OptionError` for token ids, which are not messages."""
    chats = []
    for prompt in prompts:
        if isinstance(prompt, list):
            raise OptionError(
                "--chat takes texts and messages, but a prompt has token ids", remedy="leave --chat out", option="chat"
            )
        chats.append(prompt if isinstance(prompt, Chat) else Chat([{"role": "user", "content": prompt}]))
    return chats


def format_prompts(prompts: Sequence[Prompt], llm: LLM, **settings: Any) -> list[str | list[int]]:
    """Convert prompts for `LLM.generate`. settings: keyword arguments of `LLM.chat_prompt`."""
    return [llm.chat_prompt(prompt.messages, **settings) if isinstance(prompt, Chat) else prompt for prompt in prompts]
