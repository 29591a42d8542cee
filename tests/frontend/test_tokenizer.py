"""The texts of single tokens, and folders whose tokenizer cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from antiphon.core.bundled import bundled_model
from antiphon.core.errors import ModelError
from antiphon.core.sampling import Logprob
from antiphon.core.warn_once import warn_once
from antiphon.frontend.detokenizer import TextBefore
from antiphon.frontend.tokenizer import Tokenizer, _plain_decode
from antiphon.server.logprobs import TextPlaces, completion_logprobs
from tests.support.errors import raises
from tests.support.tokenizers import marked_spaces


def test_token_texts_add_up_to_the_text(tmp_path: Path) -> None:
    pieces, prompt, text = marked_spaces(tmp_path), "Once upon", " a time  there was!"
    token_ids = pieces.encode(prompt + text)[len(pieces.encode(prompt)) :]
    assert "".join(map(pieces.token_text, token_ids)) == text == pieces.decode(token_ids, continues=True)
    with_space, without = pieces.encode("was was!was")[1], pieces.encode("!was")[-1]
    assert (pieces.token_text(with_space), pieces.token_text(without)) == (" was", "was")
    assert pieces.token_text(1) == "<s>"


def test_texts_of_byte_level_tokens_are_as_before() -> None:
    tokenizer = Tokenizer(str(bundled_model()))
    token_ids = tokenizer.encode("The dog 你好 ran")
    assert tokenizer.decode(token_ids, continues=True) == tokenizer.decode(token_ids) == "The dog 你好 ran"
    assert all(tokenizer.token_text(i) == tokenizer._decode([i], skip_special_tokens=False) for i in range(4096))


@pytest.mark.parametrize("begins", [True, False])
def test_offsets_are_places_in_the_text(tmp_path: Path, begins: bool) -> None:
    """Also where echo makes the prompt, whose first word has no space, a part of the text."""
    pieces, whole = marked_spaces(tmp_path), "Once upon a time"
    token_ids = pieces.encode(whole)[0 if begins else 2 :]
    places = [{i: Logprob(logprob=-1.0, rank=1, decoded_token=pieces.token_text(i))} for i in token_ids]
    start = 0 if begins else len("Once")
    before = TextBefore.of(pieces, pieces.encode("Once")[:start])
    text_places = TextPlaces(pieces, start=start, before=before)
    told = completion_logprobs(places, token_ids, num_top=0, tokenizer=pieces, text_places=text_places)
    assert text_places.add(pieces.special_id("</s>")) == len(whole)
    for offset, text in list(zip(told["text_offset"], told["tokens"], strict=True))[2:]:
        assert whole[offset:].startswith(text) and text.startswith(" ")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_another_format_is_a_model_error(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundled_model(), folder)
    content = json.loads((folder / name).read_text())
    if name == "tokenizer.json":
        content["model"]["type"] = "BPE of tomorrow"
    else:
        content = [content]
    (folder / name).write_text(json.dumps(content))
    with raises(ModelError, str(folder), option="model", value=str(folder), remedy="transformers") as raised:
        Tokenizer(str(folder))
    assert raised.error.limit and "\n" not in str(raised.error)


class InPython:
    """A tokenizer that has no fast version."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        return " ".join(map(str, token_ids))


def test_a_tokenizer_in_python_is_used_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    for _ in range(2):
        assert _plain_decode(InPython())([1, 2], skip_special_tokens=True) == "1 2"
    (said,) = caplog.messages
    assert "(InPython) runs in Python" in said and "tokenizer.json" in said
    Tokenizer(str(bundled_model()))
    assert len(caplog.messages) == 1
