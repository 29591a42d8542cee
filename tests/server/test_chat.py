"""`/v1/chat/completions` and the small endpoints, through the openai client where it supports them."""

from __future__ import annotations

from typing import Any

import pytest

import antiphon
from antiphon import LLM, SamplingParams
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

MODEL = "tiny-deepseek"
MESSAGES: list[Any] = [
    {"role": "system", "content": "You are a poet."},
    {"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]},
    {"role": "assistant", "content": "Once upon a time"},
    {"role": "user", "content": "Go on.", "name": "somebody"},
]
PLAIN = [
    {"role": "system", "content": "You are a poet."},
    {"role": "user", "content": "Tell me a story."},
    {"role": "assistant", "content": "Once upon a time"},
    {"role": "user", "content": "Go on."},
]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0, "max_completion_tokens": 12},
        {"seed": 5, "n": 2, "max_tokens": 8, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0.0, "stop": ["."], "logprobs": True},
        {"seed": 6, "top_p": 0.9, "presence_penalty": 1.0, "max_tokens": 8, "user": "me", "metadata": {"a": "b"}},
    ],
)
def test_a_chat_gives_what_generate_gives(server: ServerProcess, two_ranks: LLM, params: dict[str, Any]) -> None:
    params = {"temperature": 1.0, **params}
    own = dict(params)
    own["max_tokens"] = own.pop("max_completion_tokens", own.get("max_tokens"))
    own["logprobs"] = own.pop("top_logprobs", 0) if own.get("logprobs") else None
    own = {name: value for name, value in own.items() if name not in ("user", "metadata")}
    (output,) = two_ranks.generate([two_ranks.chat_prompt(PLAIN)], SamplingParams(**own))

    answer = server.client().chat.completions.create(model=MODEL, messages=MESSAGES, **params)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    streamed = server.client().chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **params)
    texts: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    reasons: dict[int, str] = {}
    for chunk in streamed:
        assert chunk.object == "chat.completion.chunk" and chunk.usage is None
        (piece,) = chunk.choices
        if piece.index not in texts:
            assert piece.delta.role == "assistant" and piece.delta.content == ""
        assert piece.index not in reasons
        texts[piece.index] = texts.get(piece.index, "") + (piece.delta.content or "")
        if piece.logprobs is not None:
            tokens.setdefault(piece.index, []).extend(entry.token for entry in piece.logprobs.content)
        if piece.finish_reason is not None:
            reasons[piece.index] = piece.finish_reason
    for choice, result in zip(answer.choices, output.outputs, strict=True):
        assert choice.message.role == "assistant" and choice.message.refusal is None
        assert choice.message.content == texts[choice.index] == result.text
        assert choice.finish_reason == reasons[choice.index] == result.finish_reason
        if own["logprobs"] is None:
            assert choice.logprobs is None
            continue
        assert [entry.token for entry in choice.logprobs.content] == tokens[choice.index]
        for entry, token_id, place in zip(choice.logprobs.content, result.token_ids, result.logprobs, strict=True):
            assert entry.logprob == pytest.approx(place[token_id].logprob, abs=1e-3)
            assert bytes(entry.bytes).decode() == entry.token == place[token_id].decoded_token
            assert len(entry.top_logprobs) == own["logprobs"]
            assert [one.logprob for one in entry.top_logprobs] == sorted(
                (one.logprob for one in entry.top_logprobs), reverse=True
            )
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)
    assert answer.usage.completion_tokens == sum(len(result.token_ids) for result in output.outputs)


def test_a_reply_can_be_sent_back(server: ServerProcess) -> None:
    """As the openai client returns it, with all its empty fields, and as other servers write it."""
    client = server.client()
    reply = client.chat.completions.create(model=MODEL, messages=PLAIN, max_tokens=4, temperature=0).choices[0].message
    dumped = reply.model_dump()
    assert "annotations" in dumped, "the client knows more fields than the server sends"
    idle = {"annotations": [], "refusal": "", "audio": None, "function_call": None, "tool_calls": [], "reasoning": ""}
    plain = {"role": "assistant", "content": reply.content}
    others = [
        dumped,
        plain | idle | {"reasoning_content": "", "unheard_of": None},
        plain | {"reasoning_content": "Hm."},
    ]
    texts = {
        client.chat.completions.create(model=MODEL, messages=[*PLAIN, message, PLAIN[-1]], max_tokens=4, temperature=0)
        .choices[0]
        .message.content
        for message in [plain, *others]
    }
    assert len(texts) == 1
    silent = [*PLAIN, {"role": "assistant", "content": None}, PLAIN[-1]]
    assert client.chat.completions.create(model=MODEL, messages=silent, max_tokens=1).usage.completion_tokens == 1


def test_bytes_of_tokens_are_those_of_the_vocabulary(server: ServerProcess, two_ranks: LLM) -> None:
    """Including the bytes of parts of a character, which have no text of their own."""
    smile = [token_id for token_id in two_ranks._core.tokenizer.encode("😊", add_special_tokens=False) if token_id > 5]
    found = b""
    for token_id in smile:
        options: Any = {"max_tokens": 1, "logprobs": True, "top_logprobs": 1, "logit_bias": {str(token_id): 100}}
        answer = server.client().chat.completions.create(model=MODEL, messages=PLAIN, temperature=0, **options)
        (entry,) = answer.choices[0].logprobs.content
        found += bytes(entry.bytes)
        assert all(bytes(one.bytes).decode(errors="replace") == one.token for one in entry.top_logprobs)
    assert len(smile) > 1 and found.endswith("😊".encode()) and found[-4] == 240


def test_usage_comes_last_in_a_stream(server: ServerProcess) -> None:
    options: Any = {"max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(server.client().chat.completions.create(model=MODEL, messages=PLAIN, **options))
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage.completion_tokens == 3
    raw = server.post("/v1/chat/completions", json={"messages": PLAIN, **options})
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])


def test_extras_of_a_chat(server: ServerProcess) -> None:
    extra = {"prompt_logprobs": 1, "return_token_ids": True, "top_k": 3, "ignore_eos": True, "min_tokens": 2}
    answer = server.client().chat.completions.create(model=MODEL, messages=PLAIN, max_tokens=4, extra_body=extra)
    assert len(answer.choices[0].token_ids) == 4
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids) == answer.usage.prompt_tokens


def test_models_version_and_health(server: ServerProcess) -> None:
    client = server.client()
    (model,) = client.models.list().data
    assert model.id == MODEL and model.object == "model" and model.max_model_len == 4096
    assert client.models.retrieve(MODEL).id == MODEL
    assert server.get("/version").json() == {"version": antiphon.__version__}
    for path in ("/health", "/ready"):
        assert (server.get(path).status_code, server.get(path).json()) == (200, {"status": "ok"})
    assert "antiphon:kv_cache_usage_perc" in server.get("/metrics").text


def test_tokens_of_texts_and_chats_and_back(server: ServerProcess, two_ranks: LLM) -> None:
    text = "One day the king — « né » 🙂 slept."
    told = server.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) and told["max_model_len"] == 4096
    assert server.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}
    bare = server.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == told["tokens"][1:] and bare["token_strs"] is None
    chat = server.post("/tokenize", json={"messages": PLAIN, "model": MODEL}).json()
    assert chat["tokens"] == two_ranks.chat_prompt(PLAIN)


def test_a_request_id_is_echoed_or_made(server: ServerProcess) -> None:
    assert server.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [
        server.get("/version", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 200)
    ]
    assert all(one.startswith("req-") for one in made) and len(set(made)) == 3
