"""The life of a server: starting, draining, signals, and ranks that die."""

from __future__ import annotations

import logging.config
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from antiphon import cli
from antiphon.server.options import ServerOptions
from tests.support.processes import worker_pids
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

MODEL = "tiny-deepseek"
LONG = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}


def assert_gone(pids: dict[int, int]) -> None:
    deadline = time.monotonic() + 5
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"workers {left} are left behind"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_starts_and_drains() -> None:
    with ServerProcess("--ranks", "1", "--drain-s", "60", wait=False) as server:
        health = server.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "starting"
        assert server.get("/ready").status_code == 503
        refused = server.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert server.get("/metrics").status_code == 200
        server.wait_until_ready()

        workers = worker_pids(server.process.pid)
        assert len(workers) == 1
        options = {**LONG, "max_tokens": 400}
        client, other = server.client(), server.client()  # created now, because a TLS context takes long
        stream = client.completions.create(stream=True, **options)
        texts = [next(iter(stream)).choices[0].text]
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(other.completions.create, **options, temperature=0)
            wait_until(lambda: server.metric("antiphon:num_requests_open") >= 2, "two open requests")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.get("/ready").status_code != 200, "the drain")
            assert server.get("/health").json() == {"status": "draining"}
            with pytest.raises(openai.APIStatusError) as late:
                client.completions.create(model=MODEL, prompt="a")
            assert late.value.status_code == 503 and late.value.code == "draining"
            chunks = list(stream)
            assert chunks[-1].choices[0].finish_reason == "length" and len(texts) + len(chunks) > 50
            assert whole.result().usage.completion_tokens == 400
        assert server.process.wait(10) == 0
        assert_gone(workers)


@pytest.mark.slow
def test_two_signals_end_it_at_once() -> None:
    with ServerProcess("--ranks", "1") as server:
        workers = worker_pids(server.process.pid)
        stream = iter(server.client().completions.create(stream=True, **LONG))
        next(stream)
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)  # as a program does that passes on its own signal
        while server.get("/ready").status_code == 200:
            time.sleep(0.01)
        time.sleep(1)
        assert next(stream), "both signals counted as one, so it drains"
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "shutting_down"
        assert server.process.wait(10) == 130
        assert time.monotonic() - start_s < 8
        assert_gone(workers)


@pytest.mark.slow
def test_what_is_open_when_the_time_to_drain_is_over_gets_an_error() -> None:
    with ServerProcess("--ranks", "1", "--drain-s", "0.5") as server:
        stream = iter(server.client().completions.create(stream=True, **LONG))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "shutting_down"
        assert server.process.wait(10) == 0


@pytest.mark.slow
def test_a_signal_ends_the_start() -> None:
    with ServerProcess("--ranks", "1", wait=False) as server:
        while not (workers := worker_pids(server.process.pid)):
            time.sleep(0.02)
        assert server.end() == 0
        assert_gone(workers)


def test_a_worker_that_is_killed_ends_everything_with_errors() -> None:
    with ServerProcess("--ranks", "2", "--dbo", "on", "--timeout-s", "10") as server:
        workers = worker_pids(server.process.pid)
        (victim,) = [pid for pid, rank in workers.items() if rank == 1]
        clients = [iter(server.client().completions.create(stream=True, **LONG)) for _ in range(4)]
        for stream in clients:
            next(stream)

        def read(stream: object) -> Exception:
            with pytest.raises(openai.APIError) as ended:
                list(stream)  # type: ignore[call-overload]
            return ended.value

        seen: list[tuple[int, dict[str, str]]] = []

        def watch() -> None:
            try:
                while True:
                    health = server.get("/health")
                    seen.append((health.status_code, health.json()))
                    time.sleep(0.05)
            except httpx.HTTPError:
                pass  # it has ended

        with ThreadPoolExecutor(5) as pool:
            ends = [pool.submit(read, stream) for stream in clients]
            whole = pool.submit(server.post, "/v1/completions", json={"prompt": "a", "max_tokens": 4000, "n": 2})
            wait_until(lambda: server.metric("antiphon:num_requests_open") >= 5, "five open requests")
            watching = threading.Thread(target=watch)
            watching.start()
            os.kill(victim, signal.SIGKILL)
            start_s = time.monotonic()
            errors = [end.result(timeout=10) for end in ends]
            answer = whole.result(timeout=10)
            assert time.monotonic() - start_s < 10
            assert server.process.wait(10) == 1
            assert time.monotonic() - start_s < 10
            watching.join(10)
        assert all("rank 1" in str(error) and "SIGKILL" in str(error) for error in errors)
        assert answer.status_code == 500 and "rank 1" in answer.json()["error"]["message"]
        assert seen[-1][0] == 503 and seen[-1][1]["status"] == "dead" and "rank 1" in seen[-1][1]["detail"]
        assert "the engine has failed" in server.log
        assert_gone(workers)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "PORT"], ["127.0.0.1", "PORT", "--port"]),
        (["--host", "no.such.host.invalid"], ["no.such.host.invalid", "--host"]),
        (["--port", "70000"], ["port=70000", "65535"]),
        (["--max-queue", "0"], ["max_queue=0"]),
        (["--max-body-bytes", "0"], ["max_body_bytes=0"]),
        (["--ranks", "5", "--port", "0"], ["num_experts=32", "ranks=5"]),
        (["--drain-s", "-1"], ["drain_s=-1.0"]),
        (["--request-timeout-s", "0"], ["request_timeout_s=0.0"]),
        (["--api-key", ""], ["api_key"]),
        (["--served-model-name", ""], ["served_model_names"]),
        (["--log-format", "xml"], ["log_format='xml'", "json"]),
        (["--prot", "1"], ["--prot", "--port"]),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(
    words: list[str], told: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)  # the log is pytest's
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["antiphon", "serve", *(port if word == "PORT" else word for word in words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert all(name.replace("PORT", port) in line for name in told), line


def test_the_key_is_not_in_the_options_text() -> None:
    assert "sesame" not in repr(ServerOptions(api_key="sesame"))
    assert ServerOptions().host == "127.0.0.1"
