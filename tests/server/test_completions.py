"""`/v1/completions` through the openai client: every parameter, whole and streamed, gives what `LLM.generate` gives."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai.types import Completion

from antiphon import LLM, SamplingParams
from antiphon.core.sampling import GeneratedOutput
from tests.support.prompts import mixed_prompts
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

MODEL = "tiny-deepseek"
EXTRA = ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "prompt_logprobs")
EXTRA += ("include_stop_str_in_output",)

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "greedy": {"temperature": 0.0, "max_tokens": 24},
    "two results": {"n": 2, "max_tokens": 12},
    "greedy, two results": {"temperature": 0.0, "n": 3, "max_tokens": 5},
    "top_p": {"temperature": 0.8, "top_p": 0.7, "max_tokens": 12},
    "top_k": {"top_k": 5, "max_tokens": 12},
    "min_p": {"min_p": 0.2, "max_tokens": 12},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "max_tokens": 20},
    "logit_bias": {"temperature": 0.0, "logit_bias": {"5": 40.0, "17": 39.0}, "max_tokens": 8},
    "stop": {"temperature": 0.0, "stop": " was", "max_tokens": 24},
    "stops": {"temperature": 0.0, "stop": ["zebra", "e", "."], "max_tokens": 24, "min_tokens": 3},
    "stop is included": {"temperature": 0.0, "stop": [" a"], "include_stop_str_in_output": True, "max_tokens": 24},
    "stop_token_ids": {"temperature": 0.0, "stop_token_ids": list(range(300, 700)), "max_tokens": 24},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 60},
    "no limit": {"temperature": 0.0, "stop": ".", "max_tokens": None},
    "logprobs": {"logprobs": 3, "max_tokens": 8},
    "only its own logprob": {"logprobs": 0, "max_tokens": 8},
    "prompt_logprobs": {"prompt_logprobs": 2, "max_tokens": 4},
}


def asked(name: str) -> tuple[str, dict[str, Any]]:
    """Prompt and parameters of a case; every one has a seed."""
    place = list(CASES).index(name)
    return mixed_prompts(2 * len(CASES))[place], {"seed": 1000 + place, "temperature": 1.0, **CASES[name]}


def for_client(params: dict[str, Any]) -> dict[str, Any]:
    extra = {name: value for name, value in params.items() if name in EXTRA}
    own = {name: value for name, value in params.items() if name not in EXTRA}
    return {"model": MODEL, **own, "extra_body": extra | {"return_token_ids": True}}


@pytest.fixture(scope="module")
def expected(two_ranks: LLM) -> dict[str, GeneratedOutput]:
    """The outputs of `LLM.generate` for all cases."""
    two_ranks.reconfigure(dbo="on")
    both = [asked(name) for name in CASES]
    outputs = two_ranks.generate([prompt for prompt, _ in both], [SamplingParams(**params) for _, params in both])
    return dict(zip(CASES, outputs, strict=True))


def assert_equal(answer: Completion, output: GeneratedOutput, params: dict[str, Any]) -> None:
    assert [choice.index for choice in answer.choices] == list(range(params.get("n", 1)))
    for choice, result in zip(answer.choices, output.outputs, strict=True):
        assert choice.text == result.text
        assert choice.finish_reason == result.finish_reason
        assert choice.stop_reason == result.stop_reason
        assert choice.token_ids == result.token_ids
        assert choice.prompt_token_ids == output.prompt_token_ids
        if params.get("logprobs") is None:
            assert choice.logprobs is None
        else:
            assert_logprobs_equal(choice, result)
        if params.get("prompt_logprobs") is not None:
            assert choice.prompt_logprobs[0] is None
            for told, place in zip(choice.prompt_logprobs[1:], output.prompt_logprobs[1:], strict=True):
                assert {int(token): one["rank"] for token, one in told.items()} == {t: p.rank for t, p in place.items()}
    assert answer.usage is not None
    num_prompt, num_generated = len(output.prompt_token_ids), sum(len(result.token_ids) for result in output.outputs)
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == num_generated
    assert answer.usage.total_tokens == num_prompt + num_generated


def assert_logprobs_equal(choice: Any, result: Any) -> None:
    told = choice.logprobs
    assert told.token_logprobs == pytest.approx(
        [place[token].logprob for token, place in zip(result.token_ids, result.logprobs, strict=True)], abs=1e-3
    )
    assert told.tokens == [
        place[token].decoded_token for token, place in zip(result.token_ids, result.logprobs, strict=True)
    ]
    for top, place in zip(told.top_logprobs, result.logprobs, strict=True):
        assert set(top) == {found.decoded_token for found in place.values()}
    for offset, token, following in zip(told.text_offset, told.tokens, told.text_offset[1:], strict=False):
        assert following in (offset + len(token), offset)  # special tokens take no room


async def read_stream(stream: openai.AsyncStream[Completion]) -> Completion:
    """Assemble the chunks of a stream into a whole answer, and check their order."""
    choices: dict[int, Any] = {}
    usage, last = None, None
    async for chunk in stream:
        assert usage is None, "a chunk after the usage"
        last = chunk
        if not chunk.choices:
            usage = chunk.usage
            assert usage is not None
            continue
        assert chunk.usage is None
        (piece,) = chunk.choices
        whole = choices.get(piece.index)
        if whole is None:
            choices[piece.index] = piece
            continue
        assert whole.finish_reason is None, "a chunk after the end of its choice"
        whole.text += piece.text
        whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
        whole.token_ids += piece.token_ids
        if piece.logprobs is not None:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                getattr(whole.logprobs, name).extend(getattr(piece.logprobs, name))
    assert last is not None
    return last.model_copy(update={"choices": [choices[index] for index in sorted(choices)], "usage": usage})


def test_every_parameter_gives_what_generate_gives(server: ServerProcess, expected: dict[str, GeneratedOutput]) -> None:
    async def ask_all() -> list[Completion]:
        async with server.async_client() as client:
            return await asyncio.gather(
                *(client.completions.create(prompt=asked(n)[0], **for_client(asked(n)[1])) for n in CASES)
            )

    steps_before = server.metric("antiphon:steps_total", plan="dual")
    for name, answer in zip(CASES, asyncio.run(ask_all()), strict=True):
        assert answer.object == "text_completion" and answer.model == MODEL and answer.id.startswith("cmpl-")
        assert_equal(answer, expected[name], asked(name)[1])
    assert server.metric("antiphon:steps_total", plan="dual") > steps_before, "no step was split"


def test_streams_give_what_generate_gives(server: ServerProcess, expected: dict[str, GeneratedOutput]) -> None:
    names = [name for name, params in CASES.items() if "prompt_logprobs" not in params]

    async def ask(client: openai.AsyncOpenAI, name: str) -> Completion:
        prompt, params = asked(name)
        usage = {"include_usage": True}
        return await read_stream(
            await client.completions.create(prompt=prompt, stream=True, stream_options=usage, **for_client(params))
        )

    async def ask_all() -> list[Completion]:
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client, name) for name in names))

    for name, answer in zip(names, asyncio.run(ask_all()), strict=True):
        assert_equal(answer, expected[name], asked(name)[1])


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_every_kind(server: ServerProcess, two_ranks: LLM, stream: bool) -> None:
    texts = mixed_prompts(6)[:4]
    ids = [server.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    params = {"max_tokens": 6, "n": 2, "seed": 3, "temperature": 1.0}
    outputs = two_ranks.generate(texts, SamplingParams(**params))
    expected = [result.text for output in outputs for result in output.outputs]

    async def texts_of(client: openai.AsyncOpenAI, prompt: Any) -> list[str]:
        answer = await client.completions.create(prompt=prompt, stream=stream, **for_client(params))
        whole = await read_stream(answer) if stream else answer
        return [choice.text for choice in whole.choices]

    async def ask_all() -> list[list[str]]:
        async with server.async_client() as client:
            return await asyncio.gather(*(texts_of(client, prompt) for prompt in (texts, ids, texts[0], ids[1])))

    assert asyncio.run(ask_all()) == [expected, expected, expected[:2], expected[2:4]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("n", "times"), [(1, 1), (2, 1), (2, 160)])
def test_echo_with_logprobs(server: ServerProcess, two_ranks: LLM, stream: bool, n: int, times: int) -> None:
    """times: the logprobs of a long prompt are encoded off the event loop."""
    prompt = " ".join(["Once upon a time there was a king"] * times)
    params = SamplingParams(max_tokens=3, logprobs=1, prompt_logprobs=1, n=n)
    (output,) = two_ranks.generate([prompt], params)
    options = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0, "n": n, "logprobs": 1, "echo": True}

    async def ask() -> Completion:
        async with server.async_client() as client:
            answer = await client.completions.create(stream=stream, extra_body={"return_token_ids": True}, **options)
            return await read_stream(answer) if stream else answer

    answer = asyncio.run(ask())
    for choice, result in zip(answer.choices, output.outputs, strict=True):
        assert choice.text == prompt + result.text
        told = choice.logprobs
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        places = [*output.prompt_logprobs[1:], *result.logprobs]
        ids = [*output.prompt_token_ids[1:], *result.token_ids]
        logprobs = [place[token].logprob for place, token in zip(places, ids, strict=True)]
        assert told.token_logprobs[1:] == pytest.approx(logprobs, abs=1e-3)
        for offset, token in list(zip(told.text_offset, told.tokens, strict=True))[1:]:
            assert choice.text[offset:].startswith(token)


CHARACTERS = "Hi 😊 né 中 ok end"


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_tokens_that_are_parts_of_characters(server: ServerProcess, stream: bool) -> None:
    """Part of a character is placed where the character begins, and what follows it where the text has it."""
    params = {"prompt": CHARACTERS, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 0}

    async def ask() -> Completion:
        async with server.async_client() as client:
            answer = await client.completions.create(
                model=MODEL, stream=stream, extra_body={"return_token_ids": True}, **params
            )
            return await read_stream(answer) if stream else answer

    (choice,) = asyncio.run(ask()).choices
    places = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert choice.text.startswith(CHARACTERS)
    by_text = dict(places)
    assert (by_text[" n"], by_text[" end"]) == (4, 12)
    parts = [place for token, place in places if token == "\ufffd"]
    assert parts == [3] * 4 + [6] * 2 + [8] * 3
    for token, place in places:
        assert token in ("\ufffd", "<|bos|>") or choice.text[place:].startswith(token), (token, place)


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_ids_that_end_inside_a_character(server: ServerProcess, two_ranks: LLM, stream: bool) -> None:
    """The output completes the character, so all of it belongs to the output."""
    whole = two_ranks._core.tokenizer.encode("Hello world 😊")
    params = {"max_tokens": 1, "temperature": 0, "logit_bias": {str(whole[-1]): 100}, "logprobs": 0}

    async def ask(**more: Any) -> Completion:
        async with server.async_client() as client:
            answer = await client.completions.create(
                model=MODEL, prompt=whole[:-1], stream=stream, extra_body={"return_token_ids": True}, **params, **more
            )
            return await read_stream(answer) if stream else answer

    (echoed,) = asyncio.run(ask(echo=True)).choices
    assert echoed.text == "Hello world 😊" and echoed.logprobs.text_offset[-2:] == [12, 12]
    (alone,) = asyncio.run(ask()).choices
    assert (alone.text, alone.logprobs.text_offset) == ("😊", [12])
    (output,) = two_ranks.generate([whole[:-1]], SamplingParams(max_tokens=1, logit_bias={whole[-1]: 100}))
    assert (output.prompt, output.text) == ("Hello world ", "😊")


def test_special_tokens_are_shown_if_they_are_wanted(server: ServerProcess) -> None:
    options = {"prompt": [1, 3, 200], "max_tokens": 2, "temperature": 0, "logit_bias": {"3": 100}, "logprobs": 0}
    answers = {}
    for skip in (True, False):
        for echo in (True, False):
            extra = {"skip_special_tokens": skip}
            (choice,) = server.client().completions.create(model=MODEL, echo=echo, extra_body=extra, **options).choices
            answers[skip, echo] = (choice.text, choice.logprobs.text_offset[-2:])
    letter = answers[True, True][0]
    assert len(letter) == 1
    assert answers[True, True] == (letter, [1, 1]) and answers[True, False] == ("", [1, 1])
    assert answers[False, True] == (f"<|bos|><|user|>{letter}<|user|><|user|>", [16, 24])
    assert answers[False, False] == ("<|user|><|user|>", [16, 24])
    # Then a text is echoed as its tokens, so that they are where the offsets say.
    extra = {"skip_special_tokens": False}
    texts = options | {"prompt": "Hello there", "echo": True}
    (choice,) = server.client().completions.create(model=MODEL, extra_body=extra, **texts).choices
    assert choice.text == "<|bos|>Hello there<|user|><|user|>"
    for place, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert choice.text[place:].startswith(token)


def test_echo_alone_tells_only_the_prompt(server: ServerProcess) -> None:
    client = server.client()
    options = {"model": MODEL, "prompt": "The old man", "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    answer = client.completions.create(**options)
    (choice,) = answer.choices
    assert choice.text == "The old man" and choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0
    (piece,) = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert piece.text == "The old man" and piece.finish_reason == "length"


def test_a_prompt_that_was_there_before_is_cached(server: ServerProcess) -> None:
    prompt = " ".join(mixed_prompts(8))
    for _ in range(2):
        answer = server.client().completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert answer.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens // 2


def test_special_tokens_can_be_left_out(server: ServerProcess) -> None:
    client = server.client()
    extra = {"add_special_tokens": False, "return_token_ids": True}
    answer = client.completions.create(model=MODEL, prompt="The ship", max_tokens=1, extra_body=extra)
    tokens = server.post("/tokenize", json={"prompt": "The ship"}).json()["tokens"]
    assert answer.choices[0].prompt_token_ids == tokens[1:]


def test_tokens_can_be_returned_as_ids(server: ServerProcess) -> None:
    answer = server.client().completions.create(
        model=MODEL, prompt="The ship", max_tokens=3, logprobs=1, extra_body={"return_tokens_as_token_ids": True}
    )
    assert all(token.startswith("token_id:") for token in answer.choices[0].logprobs.tokens)
