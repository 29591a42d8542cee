"""A small OpenAI-compatible server without a model: it streams words at a known pace and keeps what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """How it answers, and what it was asked. `fail`: by the number of the request, what goes wrong with it.

    script: the parts of every stream instead of words, before [DONE]; sent_s: when they were sent, by `perf_counter`.
    """

    first_s: float = 0.05
    gap_s: float = 0.01
    api_key: str | None = None
    usage: bool = True
    takes_ids: bool = True
    fail: dict[int, str] = field(default_factory=dict)
    script: list[bytes] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _open: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, body: dict[str, Any]) -> int:
        with self._lock:
            self.bodies.append(body)
            self.arrivals.append(time.perf_counter())
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            return len(self.bodies) - 1

    def leave(self) -> None:
        with self._lock:
            self._open -= 1

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        """Serve on a free port while the block runs."""
        fake = self

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

        class Handler(_Handler):
            server_of_fakes = fake

        server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_of_fakes: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._allowed():
            self._json(200, {"object": "list", "data": [{"id": "fake/model"}, {"id": "other"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        fake = self.server_of_fakes
        number = fake.enter(body)
        try:
            if fake.fail.get(number) == "status":
                self._json(429, {"error": {"message": "too many"}})
            elif not fake.takes_ids and not isinstance(body.get("prompt", ""), str):
                self._json(400, {"error": {"message": "prompt must be a string"}})
            elif fake.script:
                self._play(fake.script)
            else:
                self._stream(body, fake.fail.get(number, ""))
        finally:
            fake.leave()

    def _allowed(self) -> bool:
        key = self.server_of_fakes.api_key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._json(401, {"error": {"message": "no key"}})
        return False

    def _json(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def _play(self, script: list[bytes]) -> None:
        fake = self.server_of_fakes
        self._begin_stream()
        for place, part in enumerate(script):
            time.sleep(fake.gap_s if place else fake.first_s)
            fake.sent_s.append(time.perf_counter())
            self.wfile.write(part)
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def _stream(self, body: dict[str, Any], fail: str) -> None:
        fake = self.server_of_fakes
        self._begin_stream()
        is_chat = "messages" in body
        num = body.get("max_tokens") or body["max_completion_tokens"]
        if is_chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for place in range(num):
            time.sleep(fake.gap_s if place else fake.first_s)
            if fail == "event" and place == 1:
                self._event({"error": {"message": "rank 1 ended"}})
                return
            if fail == "cut" and place == 1:
                return
            piece = {"delta": {"content": "a "}} if is_chat else {"text": "a "}
            self._event({"choices": [{**piece, "finish_reason": "length" if place == num - 1 else None}]})
        if fake.usage and body["stream_options"]["include_usage"]:
            self._event({"choices": [], "usage": {"prompt_tokens": 77, "completion_tokens": num}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()
