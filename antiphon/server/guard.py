"""Middleware around every request: its id, the API key check, its log line, and an answer even after a bug."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from antiphon.server.errors import ApiError
from antiphon.server.generation import CLIENT_GONE
from antiphon.server.logs import log_event
from antiphon.server.service import Service

_OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/openapi.json"})
"""For probes and scrapers: they need no key, and are logged at level debug."""
_GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_CHALLENGE = {"www-authenticate": "Bearer"}


class Guard:
    """ASGI middleware. Sets `scope["state"]["arrived_s"]` (`time.monotonic`) and `["log"]`, to which handlers add."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        key = service.options.api_key
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # uvicorn refuses WebSockets
        arrived_s = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        log: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        scope.setdefault("state", {}).update(arrived_s=arrived_s, log=log)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if self._key is not None and scope["path"] not in _OPEN_PATHS:
                self._check_key(headers.get("authorization", ""))
            await self._app(scope, receive, send_with_id)
        except ApiError as error:
            await error.answer()(scope, receive, send_with_id)
        except ClientDisconnect:
            pass  # before its body was complete
        except Exception as error:
            log_event("request failed", level=logging.ERROR, error=error, request_id=request_id, path=scope["path"])
            if not status:
                answer = ApiError(500, "internal error", remedy="see the server's log").answer()
                await answer(scope, receive, send_with_id)
        finally:
            self._log_request(scope["path"], {"status": status or CLIENT_GONE} | log, time.monotonic() - arrived_s)

    def _check_key(self, header: str) -> None:
        scheme, _, key = header.encode("latin-1").partition(b" ")
        assert self._key is not None
        if not hmac.compare_digest(key.strip(), self._key) or scheme.lower() != b"bearer":
            raise ApiError(
                401,
                "the API key is missing or wrong",
                remedy="send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=_CHALLENGE,
            )

    def _log_request(self, path: str, log: dict[str, Any], seconds: float) -> None:
        status = log["status"]
        if path in _GENERATING and status >= 400 and "num_prompt" not in log:
            self._service.metrics.rejected(status)
        level = logging.DEBUG if path in _OPEN_PATHS else logging.INFO
        log_event("request finished", level=level, seconds=seconds, **log)
