"""JSON answers: how they are encoded, and errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import JSONResponse

from antiphon.core.errors import AntiphonError, PromptLengthError, UnsupportedError
from antiphon.core.lines import escape_json_lines

_LONGEST_MESSAGE = 1000
_CODES: dict[type[AntiphonError], str] = {
    PromptLengthError: "context_length_exceeded",
    UnsupportedError: "unsupported_parameter",
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    499: "client_closed_request",
}


def to_json(content: object) -> bytes:
    """Encode as UTF-8 on one line, even for clients that split lines at U+2028. Infinity and NaN become null."""
    return escape_json_lines(msgspec.json.encode(content))


class JsonAnswer(JSONResponse):
    """An answer that `to_json` encodes."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


class ApiError(AntiphonError):
    """An error that ends a request. `option` is the field of the request at fault; clients see it as "param".

    status: the HTTP status. code: one word for programs. retry_after_s: when it makes sense to try again.
    """

    def __init__(
        self,
        status: int,
        fact: str,
        *,
        limit: str = "",
        remedy: str = "",
        option: str | None = None,
        value: Any = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(fact, limit=limit, remedy=remedy, option=option, value=value)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)

    def answer(self) -> JsonAnswer:
        return JsonAnswer(self.body(), status_code=self.status, headers=self.headers)

    def body(self) -> dict[str, Any]:
        message = str(self)
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}..."
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.option, "code": self.code}}


def bad_request(error: AntiphonError, option: str | None) -> ApiError:
    """Turn an error of the engine into a 400. option: the field of the request at fault."""
    return ApiError(
        400,
        error.fact,
        limit=error.limit,
        remedy=error.remedy,
        option=option,
        value=error.value,
        code=_CODES.get(type(error)),
    )


def refusal(error: AntiphonError, fields: frozenset[str], *, prompt_field: str) -> ApiError:
    """Turn an error of the engine about a request with these fields into a 400. prompt_field: holds the prompts."""
    option = prompt_field if error.option == "prompts" else error.option if error.option in fields else None
    return bad_request(error, option)
