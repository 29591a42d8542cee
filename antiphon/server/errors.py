"""What goes wrong with a request, in OpenAI's shape."""

from __future__ import annotations

import re
from typing import Any

from antiphon.core.errors import AntiphonError

_LONGEST_MESSAGE = 1000
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
}


class ApiError(Exception):
    """An answer that is an error.

    param: the field of the request that is to blame. code: for programs. retry_after_s: when it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal(error: AntiphonError, fields: frozenset[str], *, prompt_field: str, place: int = 0) -> ApiError:
    """The 400 for an `OptionError` or a `RequestError` of the engine, whose messages begin with what is wrong.

    fields: of the request, that a message can begin with. prompt_field: what "prompt 0" is called there.
    place: of the prompt in the request; the engine has got it alone.
    """
    message = str(error)
    first = (re.match(r"\w+", message) or [""])[0]
    code = (
        "context_length_exceeded" if first == "prompt" and "tokens" in message and "token id" not in message else None
    )
    param = prompt_field if first == "prompt" else first if first in fields else None
    return ApiError(400, message.replace("prompt 0", f"prompt {place}", 1), param=param, code=code)
