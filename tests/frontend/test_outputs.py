"""Collecting a request's outputs: text piece by piece, stop strings, logprobs, and when to cancel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.bundled import bundled_model
from antiphon.core.sampling import SamplingParams
from antiphon.engine.scheduling.request import NewToken, PromptPart, Request, TokenOutput
from antiphon.frontend.detokenizer import Detokenizer, TextBefore, whole_characters
from antiphon.frontend.outputs import Collector, StopFinder
from antiphon.frontend.tokenizer import NoTokenizer, Tokenizer
from tests.support.tokenizers import marked_spaces

UNKNOWN = "\ufffd"


@lru_cache(maxsize=1)
def bundled() -> Tokenizer:
    return Tokenizer(str(bundled_model()))


class Letters:
    """A tokenizer whose token i is the i-th text; token 0 is special. Counts the tokens that it decodes."""

    has_text = True
    special_ids = frozenset({0})

    def __init__(self, texts: Sequence[str] = ("<s>", "a", "b", "c", "ab", "ba", "aab", "bcb", " ", "é", "")) -> None:
        self.texts = texts
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], *, continues: bool = False, skip_special: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return "".join(self.texts[token_id] for token_id in token_ids if token_id or not skip_special)

    def token_text(self, token_id: int) -> str:
        return self.texts[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        return self.texts[token_id].encode() if token_id < len(self.texts) else b""

    def special_id(self, text: str) -> int | None:
        return 0 if text == self.texts[0] else None


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return marked_spaces(tmp_path_factory.mktemp("pieces"))


def make_request(prompt_ids: Sequence[int] = (1, 2, 3), **params: Any) -> Request:
    resolved = SamplingParams(**params).resolve({})
    max_tokens = resolved.max_tokens or 1
    return Request(request_id=5, prompt_ids=tuple(prompt_ids), params=resolved, max_tokens=max_tokens, seed=0)


def outputs_of(token_ids: Sequence[int], *, end: str = "length", stop_reason: int | None = None) -> list[TokenOutput]:
    """One output for each token, the last one of which ends the request."""
    last = len(token_ids) - 1
    return [
        TokenOutput(
            request_id=5,
            token=NewToken(token_id=token_id),
            finish_reason=end if place == last else None,
            stop_reason=stop_reason if place == last else None,
        )
        for place, token_id in enumerate(token_ids)
    ]


def collect(
    tokenizer: Any, token_ids: Sequence[int], *, streaming: bool = True, end: str = "length", **params: Any
) -> tuple[Collector, list[str]]:
    """The collector after all outputs, those after its end too, and the texts that it gave."""
    collector = Collector(tokenizer, make_request(**params), streaming=streaming)
    return collector, [collector.take(output).text for output in outputs_of(token_ids, end=end)]


# ---- text piece by piece


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.one_of(st.integers(0, 4095), st.integers(0, 261)), min_size=1, max_size=60))
def test_pieces_add_up_to_the_whole_text(token_ids: list[int]) -> None:
    """Any tokens, among them parts of characters that never become one, and special ones."""
    collector, texts = collect(bundled(), token_ids)
    assert collector.completion().text == bundled().decode(token_ids) == "".join(texts)


@pytest.mark.parametrize("text", ["né 你好 🙂🙂 voilà", "plain text, and more of it", "🙂" * 40])
def test_characters_come_whole(text: str) -> None:
    token_ids = bundled().encode(text)
    _, texts = collect(bundled(), token_ids)
    assert "".join(texts) == bundled().decode(token_ids)
    assert not any(UNKNOWN in piece for piece in texts)
    assert sum(bool(piece) for piece in texts) > 2, "the text did not come in pieces"


@settings(max_examples=300, deadline=None, database=None)
@given(data=st.data(), prompt=st.sampled_from(["", " ", "a", "Once upon", "Once upon ", "你"]))
def test_pieces_with_marked_spaces_add_up(pieces: Tokenizer, data: st.DataObject, prompt: str) -> None:
    """They add up to the decoded sequence of prompt and output. A text at its beginning has no leading space."""
    prompt_ids = pieces.encode(prompt)
    common = st.sampled_from([0, 2, *pieces.encode("a  was there! 你é", add_special_tokens=False)])
    anything = st.one_of(common, st.integers(0, 258), st.integers(259, 300))
    token_ids = data.draw(st.lists(anything, min_size=1, max_size=40))
    collector, texts = collect(pieces, token_ids, prompt_ids=prompt_ids)
    text, whole = collector.completion().text, pieces.decode([*prompt_ids, *token_ids])
    if UNKNOWN not in whole:  # a broken character changes the whole ones before it, which were given out
        assert pieces.decode(prompt_ids) + text == whole
        assert "".join(texts) == text


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("stop", [None, "!"])
def test_a_completion_begins_with_its_space(pieces: Tokenizer, streaming: bool, stop: str | None) -> None:
    prompt_ids, text = pieces.encode("Once upon a time"), " there was a 你 time"
    token_ids = pieces.encode("Once upon a time" + text + "!")[len(prompt_ids) :]
    collector, texts = collect(pieces, token_ids, prompt_ids=prompt_ids, streaming=streaming, stop=stop)
    assert collector.completion().text == (text if stop else text + "!")
    if streaming:
        assert "".join(texts) == collector.completion().text
        assert texts[0] == " there" and "你" in texts and not any(UNKNOWN in piece for piece in texts)


def test_a_text_that_begins_the_sequence_has_no_space_in_front(pieces: Tokenizer) -> None:
    for prompt_ids in ([1], []):  # a special token has no text
        collector, texts = collect(pieces, pieces.encode("Once upon"), prompt_ids=prompt_ids)
        assert "".join(texts) == collector.completion().text == "Once upon"


def test_many_special_tokens_do_not_take_the_space_between_words(pieces: Tokenizer) -> None:
    first, second = pieces.encode("Hello"), pieces.encode("Hello world")[2:]
    token_ids = [*first, *[1] * 40, *second]
    assert "".join(collect(pieces, token_ids, prompt_ids=[1])[1]) == pieces.decode(token_ids) == "Hello world"


@pytest.mark.parametrize("token_ids", [[1] * 2000, [0] * 2000, [1, 0, 10] * 700], ids=["text", "special", "mixed"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(token_ids: list[int]) -> None:
    tokenizer = Letters()
    detokenizer = Detokenizer(tokenizer)  # type: ignore[arg-type]
    for token_id in token_ids:
        detokenizer.add(token_id)
    assert tokenizer.num_decoded < 60 * len(token_ids)


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    part = bundled().encode("你")[-1]
    detokenizer = Detokenizer(bundled())
    texts = [detokenizer.add(part) for _ in range(200)]
    assert len(detokenizer._ids) < 40
    assert "".join(texts) + detokenizer.flush() == bundled().decode([part] * 200) == UNKNOWN * 200


def test_without_stop_strings_and_streaming_a_text_is_decoded_once() -> None:
    tokenizer = Letters()
    collector, texts = collect(tokenizer, [1, 2, 3] * 100, streaming=False)
    assert set(texts) == {""}
    assert collector.completion().text == "abc" * 100
    assert tokenizer.num_decoded == 300


def test_no_texts_with_dummy_weights() -> None:
    collector, texts = collect(NoTokenizer(), [7, 8, 9] * 30)
    assert (collector.completion().text, set(texts), len(collector.token_ids)) == ("", {""}, 90)


@pytest.mark.parametrize("text", ["a 😊😊 b", "你你", "é😊 你a"])
def test_a_prompt_may_end_anywhere_in_a_character(pieces: Tokenizer, text: str) -> None:
    """The texts of prompt and output add up, with byte-level tokens and with pieces of bytes."""
    for tokenizer in (bundled(), pieces):
        token_ids = tokenizer.encode(text)
        for cut in range(1, len(token_ids) + 1):
            prompt_ids, output_ids = token_ids[:cut], token_ids[cut:]
            before = whole_characters(tokenizer, prompt_ids)
            assert UNKNOWN not in before
            detokenizer = Detokenizer(tokenizer, before=TextBefore.of(tokenizer, prompt_ids))
            assert before + "".join(map(detokenizer.add, output_ids)) + detokenizer.flush() == text
            if output_ids:
                for streaming in (True, False):
                    collector, texts = collect(tokenizer, output_ids, prompt_ids=prompt_ids, streaming=streaming)
                    assert before + collector.completion().text == text
                    assert not streaming or before + "".join(texts) == text


# ---- the token that ends a text


@pytest.mark.parametrize(("include", "text"), [(False, "aba"), (True, "abac")])
def test_a_stop_token_is_cut_off(include: bool, text: str) -> None:
    collector = Collector(Letters(), make_request(stop_token_ids=[3], include_stop_str_in_output=include))  # type: ignore[arg-type]
    texts = [collector.take(output).text for output in outputs_of([4, 1, 3], end="stop", stop_reason=3)]
    completion = collector.completion()
    assert (completion.text, "".join(texts)) == (text, text)
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == ([4, 1, 3], "stop", 3)
    assert not collector.must_cancel


def test_the_end_of_sequence_token_has_no_text() -> None:
    for token_ids in ([4, 1, 0], [4, 1, 3]):  # special, or not
        collector, texts = collect(Letters(), token_ids, end="stop")
        assert (collector.completion().text, "".join(texts)) == ("aba", "aba")
        assert (collector.finish_reason, collector.stop_reason) == ("stop", None)


# ---- stop strings


def naive_stop(
    tokenizer: Letters, token_ids: Sequence[int], stops: Sequence[str], *, include: bool, min_tokens: int
) -> tuple[str, list[int], str | None]:
    """Text, tokens and stop string: the first token, after `min_tokens`, that completes one."""
    before = tokenizer.decode(token_ids[:min_tokens])
    for count in range(min_tokens + 1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:count])
        matches = [
            (start + len(stop), start, stop)
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > len(before)
        ]
        if matches:
            end, start, stop = min(matches)
            return text[: end if include else start], list(token_ids[:count]), stop
    return tokenizer.decode(token_ids), list(token_ids), None


@settings(max_examples=400, deadline=None, database=None)
@given(
    token_ids=st.lists(st.integers(0, 10), min_size=1, max_size=25),
    stops=st.lists(st.text("abc é", min_size=1, max_size=5), min_size=1, max_size=3, unique=True),
    include=st.booleans(),
    min_tokens=st.integers(0, 12),
    streaming=st.booleans(),
)
def test_stop_strings_are_those_of_a_naive_search(
    token_ids: list[int], stops: list[str], include: bool, min_tokens: int, streaming: bool
) -> None:
    """Across tokens, overlapping, one inside another. Text that was returned never has to be taken back."""
    tokenizer = Letters()
    params = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": min_tokens}
    collector, texts = collect(tokenizer, token_ids, streaming=streaming, max_tokens=99, **params)
    completion = collector.completion()
    found = (completion.text, completion.token_ids, completion.stop_reason)
    assert found == naive_stop(tokenizer, token_ids, stops, include=include, min_tokens=min_tokens)
    assert "".join(texts) == completion.text
    assert completion.finish_reason == ("length" if completion.stop_reason is None else "stop")
    stopped_early = len(completion.token_ids) < len(token_ids)
    assert collector.must_cancel is stopped_early


@settings(max_examples=100, deadline=None, database=None)
@given(data=st.data())
def test_stop_strings_in_texts_of_the_bundled_tokenizer(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(["The dog 你好 ran🙂 away, and the dog slept.", "one two three two one two"]))
    token_ids = bundled().encode(text)[1:]
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 6))]
    collector, texts = collect(bundled(), token_ids, stop=stop)
    completion = collector.completion()
    cut = bundled().decode(token_ids).find(stop)
    assert completion.stop_reason == stop
    assert completion.text == "".join(texts) == bundled().decode(token_ids)[:cut]
    assert stop in bundled().decode(completion.token_ids)
    assert stop not in bundled().decode(completion.token_ids[:-1])


def test_of_several_stop_strings_the_one_that_is_complete_first_is_found() -> None:
    """As if the text had come letter by letter; of two that are complete together the longer one."""
    tokenizer = Letters(["<s>", "xabcb", "x"])
    for stops, stop, text in ((["abcb", "bc"], "bc", "xa"), (["bc", "abc"], "abc", "x"), (["cb", "x"], "x", "")):
        completion = collect(tokenizer, [1, 2], stop=stops)[0].completion()
        assert (completion.stop_reason, completion.text) == (stop, text)


def test_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    finder = StopFinder(["xyz"], include=False)
    pieces = [finder.add(new, search=True, last=False) for new in ("ax", "y", "b", "xy")]
    assert pieces == ["a", "", "xyb", ""]
    assert finder.add("", search=True, last=True) == "xy"
    finder = StopFinder(["xyz"], include=True)
    assert [finder.add(new, search=True, last=False) for new in ("ax", "yzb")] == ["ax", "yz"]
    assert finder.found == "xyz"


def test_outputs_after_the_end_are_passed_over() -> None:
    collector = Collector(Letters(), make_request(stop="b"))  # type: ignore[arg-type]
    deltas = [collector.take(output) for output in outputs_of([1, 4, 1, 2])]
    assert [delta.text for delta in deltas] == ["a", "a", "", ""]
    assert [delta.finish_reason for delta in deltas] == [None, "stop", None, None]
    assert [len(delta.token_ids) for delta in deltas] == [1, 1, 0, 0]
    assert (collector.finished, collector.must_cancel, collector.completion().token_ids) == (True, True, [1, 4])


def test_a_stop_string_in_the_last_token_needs_no_cancel() -> None:
    collector, _ = collect(Letters(), [1, 4], stop="b")
    assert (collector.finish_reason, collector.stop_reason, collector.must_cancel) == ("stop", "b", False)


# ---- logprobs, logits, the prompt


def test_logprobs_of_tokens_and_of_the_prompt() -> None:
    def token(token_id: int, logprob: float, rank: int) -> NewToken:
        return NewToken(token_id=token_id, logprob=logprob, rank=rank, top=((1, -0.5), (2, -1.5), (3, -1.5), (4, -2.0)))

    collector = Collector(Letters(), make_request(logprobs=4, prompt_logprobs=4))  # type: ignore[arg-type]
    first = TokenOutput(request_id=5, token=None, prompt=PromptPart(logprobs=[token(2, -1.5, 2)]))
    assert collector.take(first).token_ids == []
    second = TokenOutput(request_id=5, token=token(7, -9.0, 40), prompt=PromptPart(logprobs=[token(3, -1.5, 2)]))
    delta = collector.take(second)
    collector.take(TokenOutput(request_id=5, token=token(1, -0.5, 1), finish_reason="length", num_cached=2))
    completion = collector.completion(3)
    assert completion.index == 3 and completion.logprobs is not None
    assert delta.logprobs == completion.logprobs[:1]
    assert list(completion.logprobs[0]) == [7, 1, 2, 3, 4] and list(completion.logprobs[1]) == [1, 2, 3, 4]
    found = completion.logprobs[0]
    assert [found[i].rank for i in (7, 1, 2, 3, 4)] == [40, 1, 2, 2, 4]
    assert (found[7].logprob, found[7].decoded_token, found[4].decoded_token) == (-9.0, "bcb", "ab")
    assert completion.cumulative_logprob == -9.5
    prompt = collector.prompt_logprobs()
    assert prompt is not None and prompt[0] is None
    assert [next(iter(one)) for one in prompt[1:] if one is not None] == [2, 3]
    assert collector.num_cached == 2


def test_results_that_were_not_requested_are_none() -> None:
    collector, _ = collect(Letters(), [1, 2])
    completion = collector.completion()
    assert (completion.logprobs, completion.cumulative_logprob, completion.logits) == (None, None, None)
    assert (collector.prompt_logits(), collector.prompt_logprobs()) == (None, None)


def test_logits_come_together() -> None:
    rows_SV = torch.randn(5, 11, dtype=torch.float64)
    data = [bytes(row.numpy().tobytes()) for row in rows_SV]
    request = make_request(return_logits=True, return_prompt_logits=True)
    collector = Collector(Letters(), request, logits_dtype=torch.float64)  # type: ignore[arg-type]
    collector.take(TokenOutput(request_id=5, token=None, prompt=PromptPart(logits=data[0] + data[1])))
    first = NewToken(token_id=1, logits=data[3])
    collector.take(TokenOutput(request_id=5, token=first, prompt=PromptPart(logits=data[2])))
    collector.take(TokenOutput(request_id=5, token=NewToken(token_id=2, logits=data[4]), finish_reason="length"))
    prompt_SV, logits_SV = collector.prompt_logits(), collector.completion().logits
    assert prompt_SV is not None and torch.equal(prompt_SV, rows_SV[:3])
    assert logits_SV is not None and torch.equal(logits_SV, rows_SV[3:])
