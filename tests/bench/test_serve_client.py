"""The client of the serving benchmark: which chunks carry tokens, when they arrived, and what is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from antiphon.bench.serve.client import Answered, Target, ask_server
from antiphon.bench.serve.load import ServeOptions, run_serve, serve_figures
from antiphon.bench.serve.workload import Ask, Workload
from tests.support.openai_server import FakeServer

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def chat(reason: str | None = None, **delta: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def usage(num_input: int, num_output: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": num_input, "completion_tokens": num_output}})


class Scripted(httpx.AsyncBaseTransport, httpx.AsyncByteStream):
    """Answers with parts that come at set times of its own clock, which stands in for the machine's."""

    def __init__(self, parts: list[tuple[float, bytes]]) -> None:
        self.now_s = 1000.0
        self._parts = parts

    def perf_counter(self) -> float:
        return self.now_s

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at_s, part in self._parts:
            self.now_s = 1000.0 + at_s
            yield part


def answered(monkeypatch: pytest.MonkeyPatch, parts: list[tuple[float, bytes]], *, is_chat: bool = True) -> Answered:
    script = Scripted(parts)
    monkeypatch.setattr("antiphon.bench.serve.client.time", SimpleNamespace(perf_counter=script.perf_counter))

    async def ask() -> Answered:
        async with httpx.AsyncClient(transport=script) as client:
            target = Target(url="http://fake/v1", model="m", is_chat=is_chat)
            return await ask_server(client, Ask(prompt="hi", max_tokens=99), target, keep_text=True)

    return asyncio.run(ask())


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("counted", [True, False])
def test_reasoning_is_tokens(monkeypatch: pytest.MonkeyPatch, name: str, counted: bool) -> None:
    pieces = [{name: f"r{place} "} for place in range(12)] + [{"content": f"c{place} "} for place in range(8)]
    parts = [(0.12, chat(role="assistant", content=""))]
    parts += [(0.17 + 0.05 * place, chat(**piece)) for place, piece in enumerate(pieces)]
    parts += [(1.13, chat("stop", content=None)), (1.14, usage(7, 20) if counted else b""), (1.15, DONE)]
    found = answered(monkeypatch, parts)
    assert not found.error and found.num_output == 20 and found.num_input == (7 if counted else 0)
    assert found.first_s == pytest.approx(0.17)
    assert found.gaps_s == pytest.approx([0.05] * 19)
    assert found.latency_s == pytest.approx(1.13)
    assert found.reasoning == "".join(f"r{place} " for place in range(12))
    assert found.text == "".join(f"c{place} " for place in range(8)), "the thinking is kept apart"
    figures = serve_figures([found], found.latency_s, (50.0,))
    assert figures["mean_ttft_ms"] == pytest.approx(170)
    assert figures["mean_tpot_ms"] == pytest.approx((1130 - 170) / 19)
    assert figures["mean_itl_ms"] == pytest.approx(50)


@pytest.mark.parametrize(
    "piece",
    [
        {"content": None, "reasoning": "x"},
        {"content": "", "reasoning_content": "x"},
        {"reasoning": "x", "reasoning_content": "x"},
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]},
        {"content": None, "tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]},
        {"function_call": {"arguments": "{"}},
        {"refusal": "no"},
        {"content": "x", "reasoning": None, "tool_calls": None},
    ],
)
def test_each_chunk_with_a_piece_counts_once(monkeypatch: pytest.MonkeyPatch, piece: dict[str, Any]) -> None:
    parts = [(0.1, chat(role="assistant", content=None)), (0.2, chat(**piece)), (0.5, chat(**piece))]
    found = answered(monkeypatch, [*parts, (0.6, chat("stop")), (0.7, DONE)])
    assert not found.error and found.num_output == 2
    assert found.first_s == pytest.approx(0.2) and found.gaps_s == pytest.approx([0.3])
    assert found.reasoning == ("xx" if "x" in (piece.get("reasoning"), piece.get("reasoning_content")) else "")


@pytest.mark.parametrize(
    "chunk",
    [
        chat(role="assistant", content=""),
        chat(role="assistant"),
        chat(content=None),
        chat(reasoning=None, reasoning_content="", tool_calls=[]),
        event({"choices": [{"index": 0, "delta": None, "finish_reason": None}]}),
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": ""}]}),
        event({"choices": []}),
        event({"choices": None, "usage": None}),
        usage(7, 0),
        b": alive\n\n",
        b"event: ping\ndata:\n\n",
    ],
)
def test_a_chunk_without_a_piece_is_no_token(monkeypatch: pytest.MonkeyPatch, chunk: bytes) -> None:
    parts = [(0.1, chunk), (0.2, chat(content="a")), (0.3, chunk), (0.5, chat(content="b"))]
    found = answered(monkeypatch, [*parts, (0.6, chunk), (0.7, usage(7, 2)), (0.8, DONE)])
    assert not found.error and found.num_output == 2 and found.text == "ab"
    assert found.first_s == pytest.approx(0.2) and found.gaps_s == pytest.approx([0.3])
    assert found.latency_s == pytest.approx(0.5)


def test_a_chunk_with_the_end_and_a_piece_is_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [(0.2, chat(reasoning="a")), (0.3, chat("length", reasoning="b")), (0.4, DONE)]
    found = answered(monkeypatch, parts)
    assert (found.num_output, found.reasoning, found.text) == (2, "ab", "") and found.gaps_s == pytest.approx([0.1])


def test_parts_of_characters_are_tokens_of_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "é", ""]
    parts = [(0.1 * (1 + place), event({"choices": [{"text": text}]})) for place, text in enumerate(texts)]
    parts += [(0.4, event({"choices": [{"text": "", "finish_reason": "stop"}]})), (0.5, DONE)]
    found = answered(monkeypatch, parts, is_chat=False)
    assert not found.error and (found.num_output, found.text) == (3, "é")
    assert found.first_s == pytest.approx(0.1) and found.gaps_s == pytest.approx([0.1, 0.1])


ODD_TEXT = "a\u2028b\x85c\u2029d\f\v\x1c\x1d\x1e\r\ne 😀"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_text_may_hold_what_ends_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, is_chat: bool, end: str) -> None:
    piece = {"delta": {"content": ODD_TEXT}} if is_chat else {"text": ODD_TEXT}
    stream = (event({"choices": [piece]}) * 2 + usage(3, 2) + DONE).replace(b"\n", end.encode())
    parts = [(0.01 * place, stream[place : place + 1]) for place in range(len(stream))]
    found = answered(monkeypatch, parts, is_chat=is_chat)
    assert not found.error and found.text == 2 * ODD_TEXT and (found.num_input, found.num_output) == (3, 2)
    first = stream.index(end.encode() * 2) + len(end) + 1  # bytes to the one that ends the first event
    assert found.first_s == pytest.approx(0.01 * (first - 1))


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (b"data: [DONE]", ""),
        (b"data: [DONE]\n", ""),
        (b"", "without [DONE]"),
        (b'data: {"choices": [{"te', "without [DONE]"),
        (b"data: {\n\n", "cannot be read"),
        (b"data: []\n\n", "an event is not an object"),
    ],
)
def test_how_a_stream_ends(monkeypatch: pytest.MonkeyPatch, last: bytes, error: str) -> None:
    found = answered(monkeypatch, [(0.1, chat(content="a")), (0.2, last)])
    assert error in found.error and bool(found.error) == bool(error)


def test_reasoning_is_measured_and_kept_through_http() -> None:
    """Times are compared with those at which the server sent, and only as no delay can turn them round."""
    chunks = [chat(role="assistant", content=""), *[chat(reasoning="think ")] * 3, chat(content="so\u2028")]
    fake = FakeServer(first_s=0.0, gap_s=0.02, script=[*chunks, chat("stop"), usage(9, 4)])
    options = {"endpoint": "/v1/chat/completions", "workload": Workload(num_prompts=1), "detailed": True}
    with fake.running():
        result = run_serve(ServeOptions(base_url=fake.url, **options))
    assert result["completed"] == 1 and not result["failures"]
    assert (result["total_output_tokens"], len(result["itls"][0])) == (4, 3)
    assert result["generated_texts"] == ["so\u2028"] and result["reasoning_texts"] == ["think think think "]
    started_s, reasoned_s, ended_s = fake.sent_s[0], fake.sent_s[1], fake.sent_s[5]
    assert result["mean_ttft_ms"] >= 1e3 * (reasoned_s - started_s)
    assert result["mean_e2el_ms"] >= 1e3 * (ended_s - started_s)
    between_ms = result["mean_e2el_ms"] - result["mean_ttft_ms"]
    assert result["mean_tpot_ms"] == pytest.approx(between_ms / 3) and sum(result["itls"][0]) * 1e3 <= between_ms + 1e-6
