"""Request bodies: read within limits, parsed as strict JSON, and checked against a pydantic model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from difflib import get_close_matches
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from antiphon.core.errors import RequestError
from antiphon.server.errors import ApiError, bad_request
from antiphon.server.protocol import Body

Model = TypeVar("Model", bound=Body)

_BODY_S = 30.0
_REST_S = 2.0
_LARGE_BYTES = 64 * 2**10


async def read_body(request: Request, model: type[Model], *, max_bytes: int) -> Model:
    """Read and check a body. Raises `ApiError` with status 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        remedy = "send JSON with Content-Type: application/json"
        raise ApiError(415, f"the content type is {kind!r}", remedy=remedy, value=kind)
    stream = request.stream()
    body = None
    if int(request.headers.get("content-length", 0)) <= max_bytes:  # h11 has checked that it is a number
        try:
            async with asyncio.timeout(_BODY_S):
                body = await _read(stream, max_bytes)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {_BODY_S:.0f} s", remedy="send it again") from None
    elif "expect" in request.headers:
        raise _too_long(max_bytes)  # a client that expects "100 Continue" has sent nothing yet
    if body is None:
        await _read_rest(stream, 4 * max_bytes)
        raise _too_long(max_bytes)
    # Parsing a large body on the event loop would stall all other requests.
    return parse_body(body, model) if len(body) < _LARGE_BYTES else await asyncio.to_thread(parse_body, body, model)


async def _read(stream: AsyncIterator[bytes], max_bytes: int) -> bytearray | None:
    """The whole body, or `None` as soon as it exceeds the limit."""
    body = bytearray()
    async for part in stream:
        body += part
        if len(body) > max_bytes:
            return None
    return body


async def _read_rest(stream: AsyncIterator[bytes], max_bytes: int) -> None:
    """Keep reading a body that is too long, for a limited time and up to a limited size.

    A client that is still sending when the connection closes sees a reset instead of the answer.
    """
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_REST_S):
            async for part in stream:
                num_bytes += len(part)
                if num_bytes > max_bytes:
                    return


def _too_long(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is longer than {max_bytes} bytes",
        remedy="send less",
        code="body_too_long",
        headers={"connection": "close"},  # the unread rest would be taken for the next request
    )


def parse_body(body: bytes | bytearray, model: type[Model]) -> Model:
    """Parse and check a body. Raises `ApiError` 400 for invalid JSON (NaN and Infinity included) or a wrong field."""
    try:
        return model.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        raise _wrong_field(error.errors(include_url=False)[0], model) from None
    except ValueError as error:
        raise ApiError(400, "the body is not valid JSON", limit=str(error)) from None


def _wrong_field(error: ErrorDetails, model: type[Body]) -> ApiError:
    path, kind, context = [str(part) for part in error["loc"]], error["type"], error.get("ctx", {})
    if path[:1] not in (["messages"], ["stream_options"]):
        path = path[:1]  # below a plain field, pydantic names the branches of a union or the places of a list
    if kind == "unsupported":
        path.append(context["name"])
    param = ".".join(path)
    if kind == "unsupported":
        fact, code = f"{param} is not supported by this server", "unsupported_parameter"
        return ApiError(400, fact, remedy="leave it out", option=param, code=code)
    if kind == "missing":
        fact, code = f"{param} is missing", "missing_required_parameter"
        return ApiError(400, fact, remedy="it is required", option=param, code=code)
    if kind == "extra_forbidden":
        near = get_close_matches(path[-1], model.model_fields, n=1) if len(path) == 1 else []
        remedy = f"did you mean {near[0]}?" if near else "leave it out"
        return ApiError(400, f"there is no parameter {param}", remedy=remedy, option=param, code="unknown_parameter")
    if isinstance(cause := context.get("error"), RequestError):
        return bad_request(cause, param)
    return ApiError(400, f"{param or 'the body'} is invalid", limit=error["msg"], option=param or None)
