"""Chats: the messages of callers, the checkpoint's template, its variables, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import AntiphonError, ModelError, RequestError, UnsupportedError
from antiphon.frontend.chat import chat_messages, joined_text
from antiphon.frontend.tokenizer import Tokenizer
from tests.support.checkpoints import copy_bundled
from tests.support.errors import raises

# As Qwen3's: the reasoning can be switched off, and is kept of earlier turns.
THINKING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As Mixtral's: no system message, alternating roles.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
ANSWERED = [*HELLO, {"role": "assistant", "content": "The fox is"}]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(copy_bundled(tmp_path_factory.mktemp("thinking"), chat_template=THINKING)))


def text_of(tokenizer: Tokenizer, messages: Any, **settings: Any) -> str:
    return tokenizer.decode(tokenizer.chat(messages, **settings), skip_special=False)


def test_variables_of_the_template_are_passed_on(thinking: Tokenizer) -> None:
    assert text_of(thinking, HELLO) == "<|user|>Hello<|assistant|>"
    off = text_of(thinking, HELLO, template_kwargs={"enable_thinking": False})
    assert off == "<|user|>Hello<|assistant|><think>\n\n</think>\n\n"
    assert text_of(thinking, HELLO, template_kwargs={"enable_thinking": True, "other": 1}) == text_of(thinking, HELLO)


def test_an_answer_begins_or_the_last_message_continues(thinking: Tokenizer) -> None:
    assert text_of(thinking, ANSWERED) == "<|user|>Hello<|assistant|>The fox is<|assistant|>"
    for settings in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        assert text_of(thinking, ANSWERED, **settings) == "<|user|>Hello<|assistant|>The fox is"
    bundled = Tokenizer(str(bundled_model()))  # its template closes an assistant's message
    closed = text_of(bundled, ANSWERED, add_generation_prompt=False)
    assert closed == text_of(bundled, ANSWERED, continue_final_message=True) + "<|eos|>"


def test_earlier_reasoning_reaches_the_template(thinking: Tokenizer) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Red.", "reasoning_content": "A fox."}]
    told = text_of(thinking, messages, add_generation_prompt=False)
    assert told == "<|user|>Hello<|assistant|><think>A fox.</think>Red."


def test_text_parts_are_joined_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "Tell me ", "cache_control": None}, {"type": "input_text", "text": "a story."}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant", "content": None}]
    assert chat_messages(messages) == [
        {"role": "system", "content": "Tell me a story."},
        {"role": "assistant", "content": ""},
    ]
    assert joined_text("as it is\n") == "as it is\n"


WRONG = [
    ([], "messages"),
    ("Hello", "messages"),
    (HELLO[0], "messages"),
    ([*HELLO, "Hello"], "messages.1"),
    ([{"content": "Hello"}], "messages.0"),
    ([{"role": 1, "content": "Hello"}], "messages.0"),
    ([{"role": "user"}], "messages.0.content"),
    ([{"role": "user", "content": 5}], "messages.0.content"),
    ([{"role": "user", "content": []}], "messages.0.content"),
    ([{"role": "user", "content": ["a"]}], "messages.0.content"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content"),
    ([{"role": "user", "content": "\ud800"}], "messages.0.content"),
]


@pytest.mark.parametrize(("messages", "where"), WRONG, ids=lambda value: repr(value)[:40])
def test_wrong_messages_are_a_request_error(thinking: Tokenizer, messages: Any, where: str) -> None:
    with raises(RequestError, where, option=where):
        thinking.chat(messages)


def test_a_part_of_another_type_is_not_supported(thinking: Tokenizer) -> None:
    with raises(UnsupportedError, option="messages.0.content", value="image_url", remedy="text"):
        thinking.chat([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    "template",
    [
        STRICT,
        "{{ messages[7].content }}",
        "{{ messages[0].content + 5 }}",
        "{{ 1 / 0 }}",
        "{% for m in messages %}{{ m.content",
        "{{ raise_exception('') }}",
    ],
)
def test_any_error_of_a_template_is_a_request_error(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(str(copy_bundled(tmp_path, chat_template=template)))
    with raises(RequestError, option="messages", remedy="chat_template_kwargs") as refused:
        tokenizer.chat([{"role": "system", "content": "You are a poet."}, *HELLO])
    assert refused.error.limit and "\n" not in str(refused.error)


@pytest.mark.parametrize(
    ("settings", "option", "value"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", True),
        ({"template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs", "chat_template"),
        ({"template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
        ({"template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
        ({"template_kwargs": {"return_dict": True}}, "chat_template_kwargs", "return_dict"),
        ({"template_kwargs": {"bos_token": "X" * 100}}, "chat_template_kwargs", "bos_token"),
        ({"template_kwargs": {7: True}}, "messages", None),
        ({"add_generation_prompt": "no"}, "add_generation_prompt", "no"),
        ({"continue_final_message": "yes"}, "continue_final_message", "yes"),
        ({"continue_final_message": None}, "continue_final_message", None),
        ({"template_kwargs": ["enable_thinking"]}, "chat_template_kwargs", ["enable_thinking"]),
    ],
)
def test_wrong_settings_are_a_request_error(
    thinking: Tokenizer, settings: dict[str, Any], option: str, value: Any
) -> None:
    with raises(RequestError, option=option, value=value):
        thinking.chat(HELLO, **settings)


def test_a_checkpoint_without_a_template_says_so(tmp_path: Path) -> None:
    with raises(ModelError, option="model", remedy="chat_template.jinja"):
        Tokenizer(str(copy_bundled(tmp_path, chat_template=None))).chat(HELLO)


def test_a_chat_offline(one_rank: LLM) -> None:
    """The last message continues where it ended: the text is that of the same tokens as a prompt."""
    ids = one_rank.chat_prompt(ANSWERED, continue_final_message=True)
    assert ids[:-3] == one_rank.chat_prompt(ANSWERED)[: len(ids) - 3]
    whole = [
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        ANSWERED[1],
    ]
    assert one_rank.chat_prompt(whole, continue_final_message=True, chat_template_kwargs={"a": 1}) == ids
    (output,) = one_rank.generate([ids], SamplingParams(max_tokens=8))
    assert output.prompt == "HelloThe fox is" and len(output.token_ids) > 1
    for messages, settings in (("Hello", {}), (HELLO, {"chat_template_kwargs": {"tokenize": 1}})):
        with pytest.raises(AntiphonError):
            one_rank.chat_prompt(messages, **settings)  # type: ignore[arg-type]
