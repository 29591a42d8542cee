"""What ends a text: the tokens of both config files and of the tokenizer, and special tokens as stop strings."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from tests.support.checkpoints import copy_bundled, rewrite_json

USER, EOS = 3, 2
QUESTION = [{"role": "user", "content": "Tell me a story about a fox."}]
LONG = SamplingParams(max_tokens=400, temperature=0.0)


def without_end_token(folder: Path, **config: Any) -> Path:
    """The bundled checkpoint, whose config files do not name its end token."""
    copy = copy_bundled(folder)
    (copy / "generation_config.json").unlink()
    rewrite_json(copy / "config.json", **{"eos_token_id": None, **config})
    return copy


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.processes)])
def test_the_token_that_only_the_tokenizer_knows_ends_a_text(
    tmp_path: Path, one_rank: LLM, ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    (expected,) = one_rank.generate([one_rank.chat_prompt(QUESTION)], LONG)
    assert expected.finish_reason == "stop" and expected.token_ids[-1] == EOS, "the test needs an answer that ends"
    with LLM(str(without_end_token(tmp_path)), ranks=ranks) as llm:
        (output,) = llm.generate([llm.chat_prompt(QUESTION)], LONG)
        assert (output.text, output.finish_reason) == (expected.text, "stop")
        assert output.token_ids == expected.token_ids
        (hidden,) = llm.generate(
            [llm.chat_prompt(QUESTION)], SamplingParams(max_tokens=8, min_tokens=8, logit_bias={EOS: 100})
        )
        assert EOS not in hidden.token_ids[:7], "min_tokens does not know the token"
    assert f"token {EOS} (" not in caplog.text  # nothing contradicts it


def test_where_the_files_differ_each_token_ends_a_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), LLM(str(without_end_token(tmp_path, eos_token_id=USER))) as llm:
        for token_id in (USER, EOS):
            (output,) = llm.generate(["Once"], SamplingParams(max_tokens=8, logit_bias={token_id: 100}))
            assert (output.token_ids, output.finish_reason, output.text) == ([token_id], "stop", "")
    (told,) = [record.getMessage() for record in caplog.records if f"token {EOS} (" in record.getMessage()]
    assert "token 2 (<|eos|>)" in told and "[3]" in told


def test_a_missing_end_token_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = without_end_token(tmp_path)
    rewrite_json(copy / "tokenizer_config.json", eos_token=None)
    with LLM(str(copy)) as llm:
        (output,) = llm.generate(["Once"], SamplingParams(max_tokens=4, logit_bias={EOS: 100}))
    assert (output.token_ids, output.finish_reason) == ([EOS] * 4, "length")
    assert str(copy) in caplog.text and "stop_token_ids" in caplog.text


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 3])
def test_a_special_token_as_a_stop_string(one_rank: LLM, include: bool, min_tokens: int) -> None:
    """It has no text to be found in, but ends the output where it appears."""
    params = SamplingParams(
        max_tokens=8,
        logit_bias={USER: 100},
        stop=["xyz", "<|user|>"],
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )
    (output,) = one_rank.generate(["Once upon"], params)
    assert output.outputs[0].stop_reason == "<|user|>" and output.finish_reason == "stop"
    assert output.token_ids == [USER] * (min_tokens + 1)
    assert output.text == ("<|user|>" if include else "")


def test_special_tokens_in_the_text(one_rank: LLM) -> None:
    shown = SamplingParams(max_tokens=3, logit_bias={USER: 100}, skip_special_tokens=False)
    hidden = SamplingParams(max_tokens=3, logit_bias={USER: 100})
    stopped = SamplingParams(max_tokens=3, logit_bias={USER: 100}, skip_special_tokens=False, stop="r|><|us")
    texts = [output.text for output in one_rank.generate(["Once"] * 3, [shown, hidden, stopped])]
    assert texts == ["<|user|>" * 3, "", "<|use"]
    ids = one_rank.chat_prompt(QUESTION)[:2]
    prompts = [output.prompt for output in one_rank.generate([ids] * 2, [shown, hidden])]
    assert prompts == ["<|bos|><|user|>", ""]
    (ended,) = one_rank.generate(
        [one_rank.chat_prompt(QUESTION)], SamplingParams(max_tokens=400, temperature=0.0, skip_special_tokens=False)
    )
    assert ended.finish_reason == "stop" and "<|eos|>" not in ended.text  # the token that ends a text is not part of it
