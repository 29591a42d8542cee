"""Reasoning is separated from the answer: in pieces of any size, in whole answers and in streams."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.bundled import bundled_model
from antiphon.core.errors import OptionError
from antiphon.engine.scheduling.request import NewToken, Request, TokenOutput
from antiphon.frontend.open_request import StreamItem
from antiphon.frontend.outputs import Collector
from antiphon.frontend.tokenizer import Tokenizer
from antiphon.server.body import parse_body
from antiphon.server.chat import ChatJob
from antiphon.server.options import ServerOptions
from antiphon.server.protocol import ChatRequest
from antiphon.server.reasoning import REASONING_PARSERS, ReasoningSplitter, reasoning_tags
from antiphon.server.service import Service
from tests.frontend.test_chat import THINKING
from tests.support.checkpoints import copy_bundled
from tests.support.errors import raises
from tests.support.server import ServerProcess

TAGS = reasoning_tags("qwen3")
EOS = 2

SAID = [
    ("<think>\nThe fox </thi is red.\n\n</think>\n\nIt is red. \n", False, "The fox </thi is red.", "It is red. \n"),
    ("  <think>a</think>b", False, "a", "b"),
    ("a\nb\n</think>\nc<think>d</think>", True, "a\nb", "c<think>d</think>"),
    ("<think></think>only", False, "", "only"),
    ("</think>only", True, "", "only"),
    (" plain, then <think>", False, "", " plain, then <think>"),
    ("<thin", False, "", "<thin"),
    ("  ", False, "", "  "),
    ("<think>cut off </thin", False, "cut off </thin", ""),
    ("cut off \n", True, "cut off", ""),
    ("", False, "", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "inside", "reasoning", "content"), SAID)
def test_a_whole_answer(text: str, inside: bool, reasoning: str, content: str) -> None:
    said = ReasoningSplitter(TAGS, inside=inside).add(text, last=True)
    assert (said.reasoning, said.content) == (reasoning, content)


@settings(max_examples=400, deadline=None, database=None)
@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", " ", "\n", "a", "é"]), max_size=14),
    inside=st.booleans(),
    data=st.data(),
)
def test_pieces_add_up_to_the_whole(text: list[str], inside: bool, data: st.DataObject) -> None:
    """However the text is cut, and nothing ever has to be taken back."""
    whole = "".join(text)
    expected = ReasoningSplitter(TAGS, inside=inside).add(whole, last=True)
    splitter, reasoning, content, left = ReasoningSplitter(TAGS, inside=inside), "", "", whole
    while left:
        size = data.draw(st.integers(1, 4))
        said = splitter.add(left[:size])
        reasoning, content, left = reasoning + said.reasoning, content + said.content, left[size:]
        assert expected.reasoning.startswith(reasoning) and expected.content.startswith(content)
    said = splitter.add("", last=True)
    assert (reasoning + said.reasoning, content + said.content) == (expected.reasoning, expected.content)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    splitter = ReasoningSplitter(TAGS, inside=False)
    pieces = [
        splitter.add(piece) for piece in ("<th", "ink>", "\n", "one", " two ", "</", "x", "</think", ">\n", "three")
    ]
    assert [piece.reasoning for piece in pieces] == ["", "", "", "one", " two", "", " </x", "", "", ""]
    assert [piece.content for piece in pieces] == [""] * 9 + ["three"]


def test_parsers_by_their_names() -> None:
    assert {"deepseek_r1", "deepseek_v3", "glm45", "qwen3"} == {*REASONING_PARSERS}
    with raises(OptionError, option="reasoning_parser", value="qwen4", remedy="qwen3"):
        ServerOptions(reasoning_parser="qwen4")
    with raises(OptionError, option="default_chat_template_kwargs", value=[1], remedy="enable_thinking"):
        ServerOptions(chat_template_kwargs=[1])  # type: ignore[arg-type]


# ---- answers, without a server


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(copy_bundled(tmp_path_factory.mktemp("thinking"), chat_template=THINKING)))


class Asked:
    """A request whose tokens are already known, as a job sees it."""

    def __init__(self, tokenizer: Tokenizer, request: Request, answers: list[str], streaming: bool) -> None:
        self.prompt_ids = request.prompt_ids
        self.num_tokens = 0
        self.collectors = [Collector(tokenizer, request, streaming=streaming) for _ in answers]
        self._ids = [[*tokenizer.encode(answer, add_special_tokens=False), EOS] for answer in answers]

    def items(self) -> Iterator[StreamItem]:
        for index, (collector, ids) in enumerate(zip(self.collectors, self._ids, strict=True)):
            for place, token_id in enumerate(ids):
                end = "stop" if place == len(ids) - 1 else None
                token = NewToken(token_id=token_id, logprob=-1.0, rank=1)
                yield StreamItem(index, collector.take(TokenOutput(request_id=0, token=token, finish_reason=end)), 0.0)
                self.num_tokens += 1


def answer(
    tokenizer: Tokenizer, answers: list[str], *, stream: bool, parser: str | None = "qwen3", **fields: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Choices of the whole answer, or of the chunks of the stream in order, and the job's prompt text."""

    async def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        service = Service(ServerOptions(reasoning_parser=parser))
        service.serve(SimpleNamespace(tokenizer=tokenizer, attach=lambda: None, on_failure=None))  # type: ignore[arg-type]
        body = {"messages": [{"role": "user", "content": "Which colour?"}], "stream": stream, **fields}
        job = ChatJob(parse_body(json.dumps(body).encode(), ChatRequest), service)
        (ids,) = await job.prompts()
        request = Request(request_id=0, prompt_ids=tuple(ids), params=job.params.resolve({}), max_tokens=99, seed=0)
        asked: Any = Asked(tokenizer, request, answers, stream)
        if stream:
            choices = [choice for item in asked.items() for choice in job.pieces(0, asked, item)]
        else:
            assert list(asked.items())
            choices = list(job.choices(0, asked))
        service.close()
        return choices, {"prompt": tokenizer.decode(ids, skip_special=False)}

    return asyncio.run(run())


def streamed(choices: list[dict[str, Any]], index: int = 0) -> dict[str, str]:
    """What the deltas of one result add up to, by field; checks that reasoning comes first."""
    found: dict[str, str] = {}
    for choice in choices:
        if choice["index"] == index:
            for name in ("reasoning_content", "content"):
                if piece := choice["delta"].get(name):
                    assert name == "content" or not found.get("content"), "reasoning after the answer has begun"
                    found[name] = found.get(name, "") + piece
    return found


ANSWER = "<think>\nFoxes are né 🦊.\n</think>\n\nIt is red."


@pytest.mark.parametrize("n", [1, 2])
def test_reasoning_has_a_field_of_its_own(thinking: Tokenizer, n: int) -> None:
    answers = [ANSWER, "No thought."][:n]
    expected = [{"reasoning_content": "Foxes are né 🦊.", "content": "It is red."}, {"content": "No thought."}][:n]
    whole, _ = answer(thinking, answers, stream=False, n=n)
    parts, _ = answer(thinking, answers, stream=True, n=n)
    for choice, want in zip(whole, expected, strict=True):
        message = choice["message"]
        assert {name: message[name] for name in ("reasoning_content", "content") if name in message} == want
        assert streamed(parts, choice["index"]) == want
    assert [piece["finish_reason"] for piece in parts if piece["finish_reason"]] == ["stop"] * n


def test_without_a_parser_the_text_is_the_content(thinking: Tokenizer) -> None:
    (whole,), _ = answer(thinking, [ANSWER], stream=False, parser=None)
    assert whole["message"]["content"] == ANSWER and "reasoning_content" not in whole["message"]
    assert streamed(answer(thinking, [ANSWER], stream=True, parser=None)[0]) == {"content": ANSWER}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_and_token_ids_are_returned_once(thinking: Tokenizer, stream: bool) -> None:
    fields = {"logprobs": True, "return_token_ids": True}
    choices, _ = answer(thinking, [ANSWER], stream=stream, **fields)
    ids = [*thinking.encode(ANSWER, add_special_tokens=False), EOS]
    assert [token_id for choice in choices for token_id in choice.get("token_ids", [])] == ids
    told = [entry["token"] for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert told == [thinking.token_text(token_id) for token_id in ids]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_can_be_left_out(thinking: Tokenizer, stream: bool) -> None:
    choices, _ = answer(thinking, [ANSWER], stream=stream, include_reasoning=False)
    assert "reasoning_content" not in json.dumps(choices)
    content = streamed(choices)["content"] if stream else choices[0]["message"]["content"]
    assert content == "It is red."


OPENS = THINKING.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>\n' }}")


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_says_where_the_answer_begins(tmp_path: Path, thinking: Tokenizer, stream: bool) -> None:
    """DeepSeek-R1's template opens the reasoning, and Qwen3's closes it at once. Users may write tags, too."""
    user = [{"role": "user", "content": "What is <think>"}]
    opens = Tokenizer(str(copy_bundled(tmp_path, chat_template=OPENS)))
    goes_on = [*user, {"role": "assistant", "content": "<think>It is"}]
    cases: list[tuple[Tokenizer, str, dict[str, Any], dict[str, str]]] = [
        (opens, "a tag\n</think>\nA tag.", {"messages": user}, {"reasoning_content": "a tag", "content": "A tag."}),
        (thinking, "A tag.", {"messages": user}, {"content": "A tag."}),
        (thinking, "A tag.", {"chat_template_kwargs": {"enable_thinking": False}}, {"content": "A tag."}),
        (
            thinking,
            " a tag</think>A tag.",
            {"messages": goes_on, "continue_final_message": True},
            {"reasoning_content": "a tag", "content": "A tag."},
        ),
    ]
    for tokenizer, text, fields, expected in cases:
        choices, _ = answer(tokenizer, [text], stream=stream, **fields)
        found = streamed(choices) if stream else choices[0]["message"]
        assert {name: found[name] for name in ("reasoning_content", "content") if name in found} == expected


def test_a_template_with_variables_runs_off_the_event_loop(thinking: Tokenizer) -> None:
    """Their cost does not show in their length, and all other requests would wait."""
    threads: list[str] = []

    class Watched:
        special_id = staticmethod(thinking.special_id)

        def chat(self, messages: Any, **settings: Any) -> list[int]:
            threads.append(threading.current_thread().name)
            return thinking.chat(messages, **settings)

    async def run() -> None:
        service = Service(ServerOptions(chat_template_kwargs={"enable_thinking": False}))
        service.serve(SimpleNamespace(tokenizer=Watched(), attach=lambda: None, on_failure=None))  # type: ignore[arg-type]
        for variables in ({}, {"enable_thinking": True}):
            body = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": variables}
            request = parse_body(json.dumps(body).encode(), ChatRequest)
            assert await service.encode_chat(request.messages, request)
        service.close()

    asyncio.run(run())
    assert threads[0] == threading.current_thread().name and threads[1].startswith("tokenizer")


def test_a_tag_that_answers_do_not_show_is_refused(tmp_path: Path) -> None:
    folder = copy_bundled(tmp_path, extra_special_tokens=["<think>"])
    with raises(OptionError, "'<think>'", option="reasoning_parser"):
        answer(Tokenizer(str(folder)), [ANSWER], stream=False)


# ---- a server


@pytest.fixture(scope="module")
def reasoning_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = copy_bundled(tmp_path_factory.mktemp("served"), chat_template=THINKING)
    words = ["--model", str(folder), "--served-model-name", "fox", "--reasoning-parser", "qwen3"]
    with ServerProcess(*words, "--default-chat-template-kwargs", '{"enable_thinking": false}') as started:
        yield started


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_a_reasoning_model_served(reasoning_server: ServerProcess) -> None:
    """Reasoning in replies and streams, the reply sent back unchanged, and variables of the template."""
    client = reasoning_server.client()
    open_thought = [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "<think>Once upon a time"},
    ]
    extra = {"continue_final_message": True}
    options: Any = {"model": "fox", "messages": open_thought, "max_tokens": 6, "temperature": 0, "extra_body": extra}
    reply = client.chat.completions.create(**options).choices[0].message
    pieces = list(client.chat.completions.create(stream=True, **options))
    thought = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in pieces)
    assert reply.reasoning_content == thought != "" and reply.content == ""
    assert not any(chunk.choices[0].delta.content for chunk in pieces)
    messages = [*open_thought[:1], reply.model_dump(), {"role": "user", "content": "Go on."}]
    again = client.chat.completions.create(model="fox", messages=messages, max_tokens=2)
    assert again.usage.completion_tokens >= 1

    def tokens(**fields: Any) -> str:
        asked = {"messages": open_thought[:1], **fields}
        ids = reasoning_server.post("/tokenize", json=asked).json()["tokens"]
        return Tokenizer(str(bundled_model())).decode(ids, skip_special=False)

    off = "<|user|>Tell me a story.<|assistant|><think>\n\n</think>\n\n"
    assert tokens() == off
    assert tokens(chat_template_kwargs={"enable_thinking": True}) == off.partition("<think>")[0]
    assert tokens(add_generation_prompt=False) == "<|user|>Tell me a story."
