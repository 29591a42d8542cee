"""The options of the server itself; the engine has its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.core.errors import OptionError, is_number, is_whole, out_of_range
from antiphon.server.reasoning import reasoning_tags

_ALL = ("*",)
_TOKEN = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How the server runs.

    host, port: where to listen. Port 0 means any free port.
    api_key: the bearer token that clients must send; `None` for no key. It appears neither in logs nor in the `repr`.
    served_model_names: the names that requests may use for the model. Answers carry the first.
    max_queue: maximum number of open results; beyond it, requests get 429.
    request_timeout_s: maximum time for one request, from its arrival to its last byte.
    drain_s: how long open requests may go on after SIGTERM.
    max_body_bytes: maximum size of a request's body; a longer one gets 413.
    reasoning_parser: separates the reasoning from the answer in chats; `None` leaves the text as it is.
    chat_template_kwargs: variables of the chat template, used where a request does not set them.
    allowed_origins: web pages of these origins may use the server (CORS); "*" for all. By default, browsers block them.
    allowed_methods, allowed_headers: what their scripts may send; "*" for all.
    allow_credentials: whether their scripts may send cookies.

    Raises `OptionError` for values that cannot work.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    served_model_names: tuple[str, ...] = ("model",)
    max_queue: int = 1024
    request_timeout_s: float = 600.0
    drain_s: float = 30.0
    max_body_bytes: int = 8 * 2**20
    reasoning_parser: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = _ALL
    allowed_headers: tuple[str, ...] = _ALL
    allow_credentials: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.port) or not 0 <= self.port < 2**16:
            raise out_of_range("port", self.port, f"an integer from 0 (a free port) to {2**16 - 1}")
        for name in ("max_queue", "max_body_bytes"):
            if not is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise out_of_range(name, getattr(self, name), "an integer of at least 1")
        for name, least in (("request_timeout_s", "above 0"), ("drain_s", "of at least 0")):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 86_400 or (value == 0 and name != "drain_s"):
                raise out_of_range(name, value, f"a number of seconds {least}, at most 86400")
        if self.reasoning_parser is not None:
            reasoning_tags(self.reasoning_parser)
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise _wrong(
                "default_chat_template_kwargs",
                self.chat_template_kwargs,
                "is not an object",
                'use one such as {"enable_thinking": false}',
            )
        if self.api_key is not None and (not self.api_key or not self.api_key.isprintable()):
            fact = "api_key is empty or has unprintable characters"
            raise OptionError(fact, remedy="use another one, or none", option="api_key")
        if not self.served_model_names or not all(self.served_model_names):
            raise _wrong("served_model_names", self.served_model_names, "has an empty name", "give at least one name")
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and (not _ORIGIN.fullmatch(origin) or origin != origin.lower()):
                remedy = "use scheme://host or scheme://host:port in lower case without a path, or *"
                raise _wrong("allowed_origins", origin, "is not an origin as browsers send it", remedy)
        for name in ("allowed_methods", "allowed_headers"):
            for word in getattr(self, name):
                if not _TOKEN.fullmatch(word):
                    raise _wrong(name, word, "is not a valid HTTP token", "use one, or * for all")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise OptionError(
                "allow_credentials cannot be combined with allowed_origins '*'",
                limit="every web page could use its visitors' cookies here, so browsers refuse it",
                remedy="name the origins",
                option="allow_credentials",
                value=True,
            )

    def without_effect(self) -> list[str]:
        """One sentence for each option that has no effect."""
        if self.allowed_origins:
            return []
        set_ones = [name for name in ("allowed_methods", "allowed_headers") if getattr(self, name) != _ALL]
        set_ones += ["allow_credentials"] * self.allow_credentials
        return [f"{name} has no effect without allowed_origins" for name in set_ones]


def _wrong(option: str, value: object, what: str, remedy: str) -> OptionError:
    return OptionError(f"{option}={value!r} {what}", remedy=remedy, option=option, value=value)
