"""Request bodies: read within limits, parsed as strict JSON, and checked against a pydantic model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from antiphon.core.errors import RequestError
from antiphon.server.errors import ApiError, bad_request
from antiphon.server.protocol import Body, Message, StreamOptions

Model = TypeVar("Model", bound=Body)

_BODY_S = 30.0
_REST_S = 2.0
_LARGE_BYTES = 64 * 2**10
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request, model: type[Model], *, max_bytes: int) -> Model:
    """Read and check a body. Raises `ApiError` with status 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        remedy = "send JSON with Content-Type: application/json"
        raise ApiError(415, f"the content type is {kind!r}", remedy=remedy, value=kind)
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdecimal() and int(announced) > max_bytes:
        if "expect" not in request.headers:  # a client that expects "100 Continue" has sent nothing yet
            await _let_it_finish(request.stream(), 4 * max_bytes)
        raise _too_long(max_bytes)
    stream = request.stream()
    try:
        async with asyncio.timeout(_BODY_S):
            body = await _read(stream, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_S:.0f} s", remedy="send it again") from None
    if body is None:
        await _let_it_finish(stream, 4 * max_bytes)
        raise _too_long(max_bytes)
    # Parsing a large body on the event loop would stall all other requests.
    return parse_body(body, model) if len(body) < _LARGE_BYTES else await asyncio.to_thread(parse_body, body, model)


async def _read(stream: AsyncIterator[bytes], max_bytes: int) -> bytes | None:
    """The whole body, or `None` as soon as it exceeds the limit."""
    parts, num_bytes = [], 0
    async for part in stream:
        num_bytes += len(part)
        if num_bytes > max_bytes:
            return None
        parts.append(part)
    return b"".join(parts)


def _too_long(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is longer than {max_bytes} bytes",
        remedy="send less",
        code="body_too_long",
        headers={"connection": "close"},  # the unread rest would be taken for the next request
    )


async def _let_it_finish(stream: AsyncIterator[bytes], most_bytes: int) -> None:
    """Read on for a while after a body has become too long.

    A client that is still sending when the connection closes sees a reset instead of the answer.
    """
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_REST_S):
            async for part in stream:
                num_bytes += len(part)
                if num_bytes > most_bytes:
                    return


def parse_body(body: bytes, model: type[Model]) -> Model:
    """Parse and check a body. Raises `ApiError` 400 for invalid JSON (NaN and Infinity included) or wrong fields."""
    try:
        content = json.loads(body.decode(), parse_constant=_refuse_constant)
        if _SURROGATE.search(body):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ApiError(400, "the body is not valid UTF-8", limit=error.reason) from None  # type: ignore[attr-defined]
    except json.JSONDecodeError as error:
        raise ApiError(400, "the body is not valid JSON", limit=str(error)) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise ApiError(400, "the body cannot be read as JSON", limit=str(error)) from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is a JSON {_json_name(content)}", remedy="send an object")
    wanted = _without_idle_fields(content, model)
    if isinstance(wanted.get("messages"), list):
        wanted["messages"] = [
            _message(message, f"messages.{place}.") if isinstance(message, dict) else message
            for place, message in enumerate(wanted["messages"])
        ]
    if isinstance(wanted.get("stream_options"), dict):
        wanted["stream_options"] = _without_idle_fields(wanted["stream_options"], StreamOptions, "stream_options.")
    try:
        return model.model_validate(wanted)
    except ValidationError as error:
        raise _wrong_field(error.errors(include_url=False)[0], model) from None
    except (OverflowError, RecursionError) as error:
        raise ApiError(400, "a value of the body is too large", limit=str(error)) from None


def _message(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The content of an assistant's message may be missing: it may have said nothing, or only have reasoned."""
    said_nothing = {"content": ""} if content.get("role") == "assistant" else {}
    return said_nothing | _without_idle_fields(content, Message, where)


def _without_idle_fields(content: dict[str, Any], model: type[Body], where: str = "") -> dict[str, Any]:
    """Drop the fields that ask for nothing. Raises `ApiError` for an unsupported one."""
    wanted = {}
    for name, value in content.items():
        if name in model.unsupported:
            if value is not None and not any(
                value == idle and type(value) is type(idle) for idle in model.unsupported[name]
            ):
                raise ApiError(
                    400,
                    f"{where}{name} is not supported by this server",
                    remedy="leave it out",
                    option=f"{where}{name}",
                    value=value,
                    code="unsupported_parameter",
                )
        elif name not in model.ignored and value is not None:
            wanted[name] = value
    return wanted


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _json_name(content: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(content), "number")


def _wrong_field(error: Any, model: type[Body]) -> ApiError:
    path = [str(part) for part in error["loc"]]
    # Below a plain field, the path names the branches of pydantic's union or the places of a list.
    param = ".".join(path if path[:1] in (["messages"], ["stream_options"]) else path[:1])
    if error["type"] == "missing":
        remedy = "it is required"
        return ApiError(400, f"{param} is missing", remedy=remedy, option=param, code="missing_required_parameter")
    if error["type"] == "extra_forbidden":
        near = get_close_matches(path[-1], model.model_fields, n=1) if len(path) == 1 else []
        remedy = f"did you mean {near[0]}?" if near else "leave it out"
        return ApiError(400, f"there is no parameter {param}", remedy=remedy, option=param, code="unknown_parameter")
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return bad_request(cause, param)
    return ApiError(400, f"{param} is wrong", limit=str(error["msg"]), option=param or None, value=error.get("input"))
