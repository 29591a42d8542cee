"""The body of a request: read within limits, as strict JSON, checked against a model of pydantic."""

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

from antiphon.server.errors import ApiError
from antiphon.server.protocol import Body, Message, StreamOptions

Model = TypeVar("Model", bound=Body)

_BODY_S = 30.0
_REST_S = 2.0
_LARGE_BYTES = 64 * 2**10
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request, model: type[Model], *, max_bytes: int) -> Model:
    """The checked body. Raises `ApiError`: 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the content type is {kind!r}; send JSON, with Content-Type: application/json")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdecimal() and int(announced) > max_bytes:
        if "expect" not in request.headers:  # such a client asks before it sends
            await _let_it_finish(request.stream(), 4 * max_bytes)
        raise _too_long(max_bytes)
    stream = request.stream()
    try:
        async with asyncio.timeout(_BODY_S):
            body = await _read(stream, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_S:.0f} s; send it again") from None
    if body is None:
        await _let_it_finish(stream, 4 * max_bytes)
        raise _too_long(max_bytes)
    # Python gives other threads, and so the event loop, their turn; a large body must not hold up the others.
    return parse_body(body, model) if len(body) < _LARGE_BYTES else await asyncio.to_thread(parse_body, body, model)


async def _read(stream: AsyncIterator[bytes], max_bytes: int) -> bytes | None:
    """`None` as soon as it is too long."""
    parts, num_bytes = [], 0
    async for part in stream:
        num_bytes += len(part)
        if num_bytes > max_bytes:
            return None
        parts.append(part)
    return b"".join(parts)


def _too_long(max_bytes: int) -> ApiError:
    # What was not read cannot be told from the next request.
    close = {"connection": "close"}
    return ApiError(413, f"the body is longer than {max_bytes} bytes; send less", code="body_too_long", headers=close)


async def _let_it_finish(stream: AsyncIterator[bytes], most_bytes: int) -> None:
    """Read the rest of a body that is too long, for a while: a client that is still sending when the connection is
    closed gets no answer, but a reset.
    """
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_REST_S):
            async for part in stream:
                num_bytes += len(part)
                if num_bytes > most_bytes:
                    return


def parse_body(body: bytes, model: type[Model]) -> Model:
    """Raises `ApiError` 400 for what is no JSON (NaN and Infinity are none), or not what the model describes."""
    try:
        content = json.loads(body.decode(), parse_constant=_refuse_constant)
        if _SURROGATE.search(body):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8 text ({error.reason}); repair it") from None  # type: ignore[attr-defined]
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON ({error}); repair it") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, too deep
        raise ApiError(400, f"the body is not JSON that can be read ({error}); repair it") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is a JSON {_json_name(content)}; send an object")
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
        first = error.errors(include_url=False, include_context=False)[0]
        raise _wrong_field(first, model) from None
    except (OverflowError, RecursionError) as error:
        raise ApiError(400, f"a value of the body is too large ({error}); use another one") from None


def _message(content: dict[str, Any], where: str) -> dict[str, Any]:
    """An assistant may have said nothing, or only have thought."""
    said_nothing = {"content": ""} if content.get("role") == "assistant" else {}
    return said_nothing | _without_idle_fields(content, Message, where)


def _without_idle_fields(content: dict[str, Any], model: type[Body], where: str = "") -> dict[str, Any]:
    """Less the fields that ask for nothing. Raises `ApiError` for what is not supported."""
    wanted = {}
    for name, value in content.items():
        if name in model.unsupported:
            if value is not None and not any(
                value == idle and type(value) is type(idle) for idle in model.unsupported[name]
            ):
                raise ApiError(
                    400,
                    f"{where}{name} is not supported by this server; leave it out",
                    param=f"{where}{name}",
                    code="unsupported_parameter",
                )
        elif name not in model.ignored and value is not None:
            wanted[name] = value
    return wanted


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _json_name(content: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(content), "number")


def _wrong_field(error: Any, model: type[Body]) -> ApiError:
    path = [str(part) for part in error["loc"]]
    # What follows the name of a plain field is the inside of pydantic's union, or of a list.
    param = ".".join(path if path[:1] in (["messages"], ["stream_options"]) else path[:1])
    if error["type"] == "missing":
        return ApiError(400, f"{param} is missing; it is required", param=param, code="missing_required_parameter")
    if error["type"] == "extra_forbidden":
        near = get_close_matches(path[-1], model.model_fields, n=1) if len(path) == 1 else []
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        return ApiError(400, f"there is no parameter {param} here; {hint}", param=param, code="unknown_parameter")
    message = str(error["msg"]).removeprefix("Value error, ")
    code = "unsupported_parameter" if "not supported" in message else None
    told = message if error["type"] == "value_error" and path[-1:] and path[-1] in message else f"{param}: {message}"
    return ApiError(400, told, param=param or None, code=code)
