"""API keys, model names, limits and clients that disconnect, on a server of one rank with low limits."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import pytest

from tests.support.server import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

KEY = "sesame-0123"
KEY_HEADER = {"authorization": f"Bearer {KEY}"}
LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}
TIMEOUT_S = 6.0
MOST_BYTES = 20_000


@pytest.fixture(scope="module")
def strict() -> Iterator[ServerProcess]:
    words = ["--ranks", "1", "--max-queue", "4", "--request-timeout-s", str(TIMEOUT_S)]
    words += [
        "--max-body-bytes",
        str(MOST_BYTES),
        "--served-model-name",
        "first",
        "--served-model-name",
        "second",
        "--log-format",
        "json",
    ]
    with ServerProcess(*words, ANTIPHON_API_KEY=KEY) as started:
        yield started


def status_in_log(server: ServerProcess, request_id: str) -> int:
    lines = map(json.loads, server.log_with(request_id).splitlines())
    (status,) = [line["status"] for line in lines if line.get("request_id") == request_id]
    return int(status)


def wait_until_free(server: ServerProcess, *, within_s: float = 10.0) -> None:
    """Wait until no request is open, here or on the ranks, and no KV block is in use."""
    deadline = time.monotonic() + within_s
    while True:
        left = [
            server.metric(name)
            for name in (
                "antiphon:num_requests_open",
                "antiphon:num_requests_running",
                "antiphon:num_requests_waiting",
                "antiphon:kv_cache_usage_perc",
            )
        ]
        if not any(left):
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_the_key_is_needed_and_never_logged(strict: ServerProcess) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}):
        for path in ("/v1/models", "/v1/nope"):
            answer = strict.get(path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert strict.post("/tokenize", json={"prompt": "a"}, headers=headers).status_code == 401
        assert strict.post("/v1/completions", json=LONG, headers=headers).status_code == 401
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert strict.get(path).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        strict.client(api_key="wrong-key-77").models.list()
    client = strict.client(api_key=KEY, default_headers={"x-request-id": "with-the-key"})
    client.completions.create(model="first", prompt="xyzzy plugh", max_tokens=1)
    told = strict.log_with("with-the-key")
    assert "request finished" in told
    for secret in (KEY, "wrong-key-77", "xyzzy"):
        assert secret not in told


def test_the_model_has_the_names_that_were_given(strict: ServerProcess) -> None:
    client = strict.client(api_key=KEY)
    assert [model.id for model in client.models.list().data] == ["first", "second"]
    for name in ("first", "second"):
        assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tiny-deepseek", prompt="a", max_tokens=1)


def test_a_body_that_is_too_long_is_refused(strict: ServerProcess) -> None:
    def parts() -> Iterator[bytes]:
        yield from [b'{"prompt": "'] + [b"word " * 1000] * 5

    headers = KEY_HEADER | {"content-type": "application/json"}
    for content in (b'{"prompt": "' + b"w" * MOST_BYTES, b"w" * 4 * MOST_BYTES, parts(), *[b"w" * MOST_BYTES * 2] * 20):
        answer = strict.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 413 and str(MOST_BYTES) in answer.json()["error"]["message"]


def raw_answer(server: ServerProcess, head: str, parts: Iterable[bytes]) -> bytes:
    """The answer to a client that sends slowly, and reads only after it has sent everything."""
    host, _, port = server.url.rpartition("/")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        lines = ["POST /v1/completions HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {KEY}"]
        connection.sendall("\r\n".join([*lines, "Content-Type: application/json", head, "", ""]).encode())
        for part in parts:
            time.sleep(0.1)
            connection.sendall(part)
        answer = b""
        while received := connection.recv(4096):
            answer += received
        return answer


def chunks(count: int) -> list[bytes]:
    return [b"%x\r\n%s\r\n" % (MOST_BYTES, b"w" * MOST_BYTES)] * count + [b"0\r\n\r\n"]


@pytest.mark.parametrize(
    ("head", "parts"),
    [
        (f"Content-Length: {3 * MOST_BYTES}", [b"w" * MOST_BYTES] * 3),
        (f"Content-Length: {3 * MOST_BYTES}\r\nExpect: 100-continue", []),
        ("Transfer-Encoding: chunked", chunks(3)),
        ("Transfer-Encoding: chunked\r\nExpect: 100-continue", chunks(3)),
    ],
)
def test_a_slow_client_learns_that_its_body_is_too_long(strict: ServerProcess, head: str, parts: list[bytes]) -> None:
    """A client that is still sending must be able to read the answer; one that asks first need not send its body."""
    answer = raw_answer(strict, head, parts)
    assert answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 413 "), answer
    assert str(MOST_BYTES).encode() in answer


def test_a_body_without_end_is_cut_off(strict: ServerProcess) -> None:
    start_s = time.monotonic()
    with pytest.raises(OSError):
        raw_answer(strict, "Transfer-Encoding: chunked", chunks(1)[:1] * 200)
    assert time.monotonic() - start_s < 10


def test_a_full_queue_and_clients_that_go(strict: ServerProcess) -> None:
    client = strict.client(api_key=KEY)
    with pytest.raises(openai.BadRequestError) as too_many:
        client.completions.create(model="first", prompt="a", n=5)
    assert too_many.value.param == "prompt"
    rejected = strict.metric("antiphon:requests_rejected_total", status="400")
    with ExitStack() as stack:
        http = stack.enter_context(httpx.Client(timeout=30, headers=KEY_HEADER))
        lines = []
        for number in range(4):
            headers = {"x-request-id": f"one-of-four-{number}"}
            answer = stack.enter_context(
                http.stream("POST", f"{strict.url}/v1/completions", json=LONG | {"stream": True}, headers=headers)
            )
            assert answer.status_code == 200
            lines.append(answer.iter_lines())
        for stream in lines:
            assert next(stream).startswith("data: {")
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="first", prompt="a")
        assert full.value.code == "queue_full" and int(full.value.response.headers["retry-after"]) >= 1
        assert strict.metric("antiphon:num_requests_open") == 4
        assert strict.metric("antiphon:kv_cache_usage_perc") > 0
    wait_until_free(strict)
    ends = [status_in_log(strict, f"one-of-four-{number}") for number in range(4)]
    assert ends == [499] * 4, "the time limit ended them, not the disconnects"
    assert strict.metric("antiphon:requests_rejected_total", status="429") == 1
    assert strict.metric("antiphon:requests_rejected_total", status="400") == rejected
    assert client.completions.create(model="first", prompt="a", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_early_leaves_nothing(strict: ServerProcess, stream: bool) -> None:
    content = json.dumps(LONG | {"stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nX-Request-Id: gone-{stream}\r\n"
    )
    aborted = strict.metric("antiphon:request_success_total", finished_reason="abort")
    host, port = strict.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as plain:
        plain.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        deadline = time.monotonic() + 5
        while strict.metric("antiphon:kv_cache_usage_perc") == 0:
            assert time.monotonic() < deadline
    wait_until_free(strict)
    assert status_in_log(strict, f"gone-{stream}") == 499, "the time limit ended it, not the disconnect"
    assert strict.metric("antiphon:request_success_total", finished_reason="abort") == aborted + 1
    with socket.create_connection((host, int(port))) as plain:  # half a body
        plain.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[:20])
    assert strict.get("/health").status_code == 200


def test_the_time_limit_of_a_request(strict: ServerProcess) -> None:
    def ask(stream: bool) -> tuple[httpx.Response, float]:
        start_s = time.monotonic()
        answer = strict.post("/v1/completions", json=LONG | {"n": 2, "stream": stream}, headers=KEY_HEADER)
        return answer, time.monotonic() - start_s

    with ThreadPoolExecutor(2) as pool:
        (answer, taken_s), (streamed, _) = pool.map(ask, (False, True))
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert TIMEOUT_S <= taken_s < TIMEOUT_S + 10
    *events, last, end = streamed.text.split("\n\n")
    assert streamed.status_code == 200 and len(events) > 1 and end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until_free(strict)


def test_the_log_has_a_line_of_json_for_every_request(strict: ServerProcess) -> None:
    content = {"prompt": "a", "max_tokens": 2, "ignore_eos": True}
    strict.post("/v1/completions", json=content, headers=KEY_HEADER | {"x-request-id": "mine-7"})
    events = [json.loads(line) for line in strict.log_with("mine-7").splitlines()]
    (event,) = [one for one in events if one.get("request_id") == "mine-7"]
    assert (event["status"], event["num_generated"], event["reason"]) == (200, 2, "length")


def test_prompts_are_all_checked_before_the_first_starts(strict: ServerProcess) -> None:
    def counts() -> tuple[float, float]:
        aborted = strict.metric("antiphon:request_success_total", finished_reason="abort")
        return aborted, strict.metric("antiphon:requests_rejected_total", status="400")

    assert strict.post("/v1/completions", json={"prompt": 7}, headers=KEY_HEADER).status_code == 400
    aborted, rejected = counts()
    answer = strict.post("/v1/completions", json={"prompt": [[5, 6, 7], [5] * 5000]}, headers=KEY_HEADER)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert "prompt 1 " in answer.json()["error"]["message"] and "5000" in answer.json()["error"]["message"]
    assert counts() == (aborted, rejected + 1)
