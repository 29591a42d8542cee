"""The faces of the offline API: prompts as dicts, chats, the tokenizer, statistics, and `print(llm)`."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

import antiphon
from antiphon import LLM, EngineStats, ModelError, RequestOutput, SamplingParams
from antiphon.frontend.tokenizer import NoTokenizer
from tests.support.errors import raises

FEW = SamplingParams(max_tokens=4)


def test_prompts_as_dicts(one_rank: LLM) -> None:
    ids = one_rank.get_tokenizer()("The ship")["input_ids"]
    plain = one_rank.generate(["The ship", ids], FEW)
    named = one_rank.generate([{"prompt": "The ship"}, {"prompt_token_ids": ids}], FEW)
    alone = one_rank.generate({"prompt": "The ship"}, FEW)
    assert [output.token_ids for output in named] == [output.token_ids for output in plain]
    assert alone[0].token_ids == plain[0].token_ids
    assert [output.prompt for output in named] == [output.prompt for output in plain]


def test_a_chat_is_its_prompt_continued(one_rank: LLM) -> None:
    first = [{"role": "user", "content": "Tell me a story."}]
    second = [{"role": "user", "content": "Who are you?"}]
    expected = one_rank.generate([one_rank.chat_prompt(first), one_rank.chat_prompt(second)], FEW)
    assert [output.token_ids for output in one_rank.chat([first, second], FEW)] == [o.token_ids for o in expected]
    (alone,) = one_rank.chat(first, FEW)
    assert alone.token_ids == expected[0].token_ids
    assert isinstance(alone, RequestOutput)
    assert (alone.outputs[0].text, alone.outputs[0].finish_reason) == (alone.text, alone.finish_reason)


@pytest.mark.parametrize("messages", [[], "Hello", 5, None, [[]], [{"role": "user"}]])
def test_wrong_chats_are_refused(one_rank: LLM, messages: Any) -> None:
    with pytest.raises(antiphon.AntiphonError):
        one_rank.chat(messages, FEW)


def test_statistics_are_a_value(one_rank: LLM) -> None:
    stats = one_rank.stats()
    assert isinstance(stats, EngineStats)
    assert stats["steps"] == stats.steps >= 0
    assert json.loads(json.dumps(stats.to_dict()))["steps_by_plan"] == stats.steps_by_plan
    graphs = stats["graphs"]
    assert graphs["replayed"] == graphs["padded"] == 0  # on a CPU
    assert sum(graphs["eager_reasons"].values()) == stats.steps
    with pytest.raises(KeyError, match="nothing"):
        stats["nothing"]
    with pytest.raises(FrozenInstanceError):
        stats.steps = 5  # type: ignore[misc]


def test_an_engine_prints_as_one_line(one_rank: LLM) -> None:
    text = repr(one_rank)
    assert "tiny-deepseek" in text and "ranks=1" in text and "\n" not in text


def test_a_run_with_dummy_weights_has_no_tokenizer() -> None:
    with raises(ModelError):
        NoTokenizer().of_transformers()


def test_every_public_name_is_there() -> None:
    assert all(getattr(antiphon, name) is not None for name in antiphon.__all__)
    assert antiphon.GeneratedOutput is RequestOutput
