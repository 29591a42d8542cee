"""A hub on this machine: what the library of the Hugging Face hub asks to find, list and download a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["LocalHub", "local_hub"]


@dataclass(slots=True)
class LocalHub:
    """Models by id, each a folder by revision; "main" is the usual one. What was asked is in `asked`."""

    models: dict[str, dict[str, Path]]
    gated: frozenset[str] = frozenset()
    private: frozenset[str] = frozenset()  # told only to those with the token "secret"
    status: int = 200  # another one is the answer to everything
    silent: bool = False  # accept, and never answer
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def commit(self, model: str, revision: str) -> str:
        return hashlib.sha1(f"{model} {self.models[model][revision]}".encode()).hexdigest()

    def folder(self, model: str, revision: str) -> Path | None:
        """revision: its name or its commit."""
        revisions = self.models[model]
        for name, folder in revisions.items():
            if revision in (name, self.commit(model, name)):
                return folder
        return None


@contextmanager
def local_hub(hub: LocalHub) -> Iterator[LocalHub]:
    """Serve `hub` until the block ends; afterwards its endpoint refuses connections."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: LocalHub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.silent:
            self.hub.ended.wait(60)
            self.close_connection = True
        elif self.hub.status != 200:
            self._send(self.hub.status, {}, b"{}", with_body)
        else:
            self._send(*self._find(path), with_body)

    def _find(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        model, rest = "/".join(parts[:2]), parts[2:]
        hub = self.hub
        if model not in hub.models or (model in hub.private and self.headers.get("authorization") != "Bearer secret"):
            return _error(401, "RepoNotFound")
        if model in hub.gated:
            return _error(403, "GatedRepo")
        kind, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        folder = hub.folder(model, revision)
        if folder is None:
            return _error(404, "RevisionNotFound")
        commit = next(hub.commit(model, name) for name, place in hub.models[model].items() if place == folder)
        files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
        if is_api and kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return _json({"id": model, "modelId": model, "sha": commit, "siblings": siblings})
        if is_api and kind == "tree":
            return _json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file)[:40]}
                    for name, file in files.items()
                ]
            )
        file_name = "/".join(rest[2:])
        if kind != "resolve" or file_name not in files:
            return _error(404, "EntryNotFound")
        file = files[file_name]
        return 200, {"ETag": f'"{_digest(file)[:40]}"', "X-Repo-Commit": commit}, file.read_bytes()

    def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"
