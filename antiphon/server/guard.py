"""Wraps every request: its id, the check of the API key, its log line, and an answer whatever happens."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.server.errors import ApiError
from antiphon.server.generation import CLIENT_GONE, send_error
from antiphon.server.logs import log_event
from antiphon.server.service import Service

_OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/openapi.json"})
"""For probes and scrapers: no key is needed, and they are logged at level debug."""
_GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_CHALLENGE = {"www-authenticate": "Bearer"}


class Guard:
    """ASGI middleware. Sets `scope["state"]["arrived_s"]`, by `time.monotonic`, and `["log"]` to add to."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        key = service.options.api_key
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # uvicorn refuses WebSockets
        arrived_s = time.monotonic()
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"x-request-id")}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        log: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        scope.setdefault("state", {}).update(arrived_s=arrived_s, log=log)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if self._key is not None and scope["path"] not in _OPEN_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            await self._app(scope, receive, send_with_id)
        except ApiError as error:
            await send_error(error, send_with_id)
        except ClientDisconnect:
            pass  # the body was not complete yet
        except Exception as error:
            log_event("request failed", level=logging.ERROR, error=error, request_id=request_id, path=scope["path"])
            if not status:
                await send_error(ApiError(500, "internal error", remedy="see the server's log"), send_with_id)
        finally:
            self._tell(scope["path"], {"status": status or CLIENT_GONE} | log, time.monotonic() - arrived_s)

    def _check_key(self, header: bytes) -> None:
        scheme, _, key = header.partition(b" ")
        assert self._key is not None
        if not hmac.compare_digest(key.strip(), self._key) or scheme.lower() != b"bearer":
            raise ApiError(
                401,
                "the API key is missing or wrong",
                remedy="send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=_CHALLENGE,
            )

    def _tell(self, path: str, log: dict[str, Any], seconds: float) -> None:
        status = log["status"]
        if path in _GENERATING and status >= 400 and "num_prompt" not in log:
            self._service.metrics.rejected(status)
        level = logging.DEBUG if path in _OPEN_PATHS else logging.INFO
        log_event("request finished", level=level, seconds=seconds, **log)
