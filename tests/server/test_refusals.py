"""What the server refuses: always in OpenAI's shape, with the field at fault, and never with a 5xx."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest

from antiphon.server.errors import to_json
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


def test_infinity_becomes_null() -> None:
    assert to_json({"logprob": -math.inf, "text": "é\n"}) == '{"logprob":null,"text":"é\\n"}'.encode()


CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"prompt": "Once", "max_tokens": 1}
JSON = {"content-type": "application/json"}

WRONG_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"temperature": -1}, "temperature"),
    ("completions", {"temperature": "hot"}, "temperature"),
    ("completions", {"temperature": True}, "temperature"),
    ("completions", {"temperature": 10**400}, "temperature"),
    ("completions", {"top_p": 0}, "top_p"),
    ("completions", {"top_k": -2}, "top_k"),
    ("completions", {"top_k": 1.5}, "top_k"),
    ("completions", {"min_p": 2}, "min_p"),
    ("completions", {"n": 0}, "n"),
    ("completions", {"n": 129}, "n"),
    ("completions", {"n": -3}, "n"),
    ("completions", {"best_of": 2}, "best_of"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"max_tokens": -1}, "max_tokens"),
    ("completions", {"max_tokens": "7"}, "max_tokens"),
    ("completions", {"min_tokens": 5}, "min_tokens"),
    ("completions", {"presence_penalty": 3}, "presence_penalty"),
    ("completions", {"frequency_penalty": -3}, "frequency_penalty"),
    ("completions", {"repetition_penalty": 0}, "repetition_penalty"),
    ("completions", {"seed": -1}, "seed"),
    ("completions", {"seed": 2**64}, "seed"),
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"logprobs": True}, "logprobs"),
    ("completions", {"prompt_logprobs": -1}, "prompt_logprobs"),
    ("completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ("completions", {"stop": ["x"] * 10_000}, "stop"),
    ("completions", {"stop": [""]}, "stop"),
    ("completions", {"stop": ["x" * 257]}, "stop"),
    ("completions", {"stop": [1]}, "stop"),
    ("completions", {"stop_token_ids": [-1]}, "stop_token_ids"),
    ("completions", {"stop_token_ids": [10**30]}, "stop_token_ids"),
    ("completions", {"stop_token_ids": ["a"]}, "stop_token_ids"),
    ("completions", {"logit_bias": {"5": 101}}, "logit_bias"),
    ("completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("completions", {"logit_bias": {"99999999": 1}}, "logit_bias"),
    ("completions", {"logit_bias": [1]}, "logit_bias"),
    ("completions", {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ("completions", {"stream": "yes"}, "stream"),
    ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("completions", {"stream": True, "stream_options": {"what": 1}}, "stream_options.what"),
    ("completions", {"suffix": "end"}, "suffix"),
    ("completions", {"skip_special_tokens": 0}, "skip_special_tokens"),
    ("completions", {"guided_json": {}}, "guided_json"),
    ("completions", {"use_beam_search": True}, "use_beam_search"),
    ("completions", {"temprature": 1}, "temprature"),
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[]]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {"prompt": [10**9]}, "prompt"),
    ("completions", {"prompt": [1, "a"]}, "prompt"),
    ("completions", {"prompt": [True]}, "prompt"),
    ("completions", {"prompt": 7}, "prompt"),
    ("completions", {"prompt": {"text": "a"}}, "prompt"),
    ("completions", {"prompt": ["a"] * 257}, "prompt"),
    ("completions", {"prompt": "word " * 5000}, "prompt"),
    ("completions", {"prompt": [5] * 4096, "stream": True}, "prompt"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": "Hello"}, "messages"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
    ("chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content",
    ),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    (
        "chat/completions",
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
        "messages.0.tool_calls",
    ),
    ("chat/completions", {"messages": [{"role": "user", "content": "a " * 5000}]}, "messages"),
    ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {"functions": [{}]}, "functions"),
    ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
    ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
    ("chat/completions", {"modalities": ["audio"]}, "modalities"),
    ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat/completions", {"logprobs": 5}, "logprobs"),
    ("chat/completions", {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("chat/completions", {"chat_template": "x"}, "chat_template"),
    ("chat/completions", {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ("chat/completions", {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ("chat/completions", {"chat_template_kwargs": ["x"]}, "chat_template_kwargs"),
    (
        "chat/completions",
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ("chat/completions", {"include_reasoning": False}, "include_reasoning"),
    ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "a", "what": 1}]}, "messages.0.what"),
    ("chat/completions", {"messages": [{"role": "assistant", "annotations": [{}]}]}, "messages.0.annotations"),
    ("chat/completions", {"echo": True}, "echo"),
]


@pytest.mark.parametrize(("path", "fields", "param"), WRONG_FIELDS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(server: ServerProcess, path: str, fields: dict[str, Any], param: str) -> None:
    content = (CHAT if path.startswith("chat") else TEXT) | fields
    answer = server.post(f"/v1/{path}", content=json.dumps(content), headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2] in error["message"] or param in ("prompt", "messages")
    assert len(error["message"]) < 1100


IDLE = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "best_of": 1,
    "suffix": None,
    "logit_bias": {},
    "stop": [],
    "seed": None,
    "skip_special_tokens": True,
    "response_format": {"type": "text"},
}


def test_fields_that_ask_for_nothing_are_taken(server: ServerProcess) -> None:
    assert server.post("/v1/completions", json=TEXT | IDLE).status_code == 200
    chat = {"tools": None, "tool_choice": "none", "parallel_tool_calls": True, "logprobs": False, "max_tokens": 1}
    chat |= {"nobody_knows_it": None, "chat_template_kwargs": {}, "continue_final_message": None}
    assert server.post("/v1/chat/completions", json=CHAT | chat).status_code == 200


BODIES: list[tuple[bytes, str]] = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"pears", "JSON"),
    (b"[]", "object"),
    (b'"text"', "object"),
    (b"7", "object"),
    (b"null", "object"),
    (b'{"prompt": "\xff\xfe"}', "JSON"),
    (b'{"prompt": "\\ud800"}', "JSON"),
    (b'{"model": "\\udfff", "prompt": "a"}', "JSON"),
    (b'{"prompt": "a", "temperature": NaN}', "JSON"),
    (b'{"prompt": "a", "temperature": Infinity}', "JSON"),
    (b'{"prompt": "a", "chat_template_kwargs": {"a": -Infinity}}', "JSON"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "a", "logit_bias": {"1": -1e999}}', "logit_bias"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON"),
    (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", "seed"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON"),
    (b'{"prompt": [' + b"[" * 150 + b"]" * 150 + b"]}", "prompt"),
    (b'{"prompt": "a", "prompt": 5}', "prompt"),
]


@pytest.mark.parametrize(("body", "word"), BODIES, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_nasty_body_gets_a_400(server: ServerProcess, path: str, body: bytes, word: str) -> None:
    answer = server.post(path, content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if path == "/v1/completions":
        assert word in error["message"], error


def test_other_refusals(server: ServerProcess) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-9", prompt="a")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    for method, path, status in [("get", "/v1/completions", 405), ("post", "/health", 405), ("get", "/v1/nope", 404)]:
        answer = getattr(server, method)(path)
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert server.get("/v1/completions").headers["allow"] == "POST"
    answer = server.post("/v1/completions", content="prompt=a", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    for content in ({"tokens": [10**6]}, {"tokens": [-1]}, {"tokens": "abc"}, {}):
        assert server.post("/detokenize", json=content).status_code == 400
    for content in ({}, {"prompt": "a", "messages": CHAT["messages"]}, {"prompt": 5}):
        assert server.post("/tokenize", json=content).status_code == 400


def test_an_error_names_the_place_of_the_wrong_prompt(server: ServerProcess) -> None:
    answer = server.post("/v1/completions", json={"prompt": ["fine", "fine", "word " * 5000]})
    error = answer.json()["error"]
    assert "prompt 2 " in error["message"] and error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert server.metric("antiphon:num_requests_open") == 0
