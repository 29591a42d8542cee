"""What the server writes is one line for every client, even one that splits lines at U+2028, and keeps its meaning."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from antiphon.bench.serve.client import Answered, Target, ask_server
from antiphon.bench.serve.workload import Ask
from antiphon.server.errors import to_json
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

ODD = "a\u2028b\x85c\u2029d\v\f\x1c\x1d\x1e\r\ne it\u2019s «é» 😀"
ECHO = {"model": "tiny-deepseek", "prompt": ODD, "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1}


def lines_for_everybody(text: str) -> list[str]:
    """The lines as the least careful reader splits them."""
    return [line for line in text.splitlines() if line]


def test_json_is_one_line_and_means_the_same() -> None:
    content = {ODD: [ODD, {"text": ODD}], "plain": "é"}
    (line,) = lines_for_everybody(to_json(content).decode())
    assert json.loads(line) == content and "«é» 😀" in line, "only what ends lines is escaped"


def test_a_whole_answer(server: ServerProcess) -> None:
    (line,) = lines_for_everybody(server.post("/v1/completions", json=ECHO).text)
    assert json.loads(line)["choices"][0]["text"].startswith(ODD)


def test_a_stream(server: ServerProcess) -> None:
    lines = lines_for_everybody(server.post("/v1/completions", json=ECHO | {"stream": True}).text)
    assert len(lines) > 2 and all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(texts).startswith(ODD)
    pieces = server.client().completions.create(stream=True, **ECHO)
    assert [piece.choices[0].text for piece in pieces] == texts


def test_our_own_client_reads_it(server: ServerProcess) -> None:
    async def ask() -> Answered:
        async with httpx.AsyncClient() as client:
            target = Target(url=f"{server.url}/v1/completions", model="tiny-deepseek", extra={"echo": True})
            return await ask_server(client, Ask(prompt=ODD, max_tokens=2), target, keep_text=True)

    found = asyncio.run(ask())
    assert not found.error and found.text.startswith(ODD) and found.num_output == 2


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/completions", {"prompt": "a", ODD: 1}, 400),
        ("/v1/completions", {"prompt": "a", "model": ODD}, 404),
        ("/v1/chat/completions", {"messages": [{"role": ODD, "content": "a"}], "stream": True}, 400),
        (f"/v1/{'%E2%80%A8'}x", {}, 404),
    ],
)
def test_an_error(server: ServerProcess, path: str, content: dict[str, Any], status: int) -> None:
    answer = server.post(path, json=content)
    assert answer.status_code == status
    (line,) = lines_for_everybody(answer.text)
    assert json.loads(line)["error"]["message"]


def test_tokens_and_their_texts(server: ServerProcess) -> None:
    (line,) = lines_for_everybody(server.post("/tokenize", json={"prompt": ODD, "return_token_strs": True}).text)
    (line,) = lines_for_everybody(server.post("/detokenize", json={"tokens": json.loads(line)["tokens"]}).text)
    assert json.loads(line)["prompt"] == ODD
