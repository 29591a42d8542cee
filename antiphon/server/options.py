"""What the user says about the server itself; the engine has options of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.core.errors import OptionError, is_number, is_whole
from antiphon.server.reasoning import reasoning_tags

_ALL = ("*",)
_TOKEN = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """host, port: where to listen; port 0 takes a free one.
    api_key: what clients must send as a bearer token; `None` for no key. It is in no log and no `repr`.
    served_model_names: under which the model is asked for; the first is in answers.
    max_queue: results that may be under way at once; more get 429.
    request_timeout_s: longest time for one request, from its arrival to its last byte.
    drain_s: how long open requests may go on after SIGTERM.
    max_body_bytes: longest body of a request; longer ones get 413.
    reasoning_parser: by which reasoning is told apart from the answer in chats; `None` for not at all.
    chat_template_kwargs: variables of the chat template, where a request does not set them.
    allowed_origins: of web pages whose scripts may read answers (CORS), or "*" for all; none: browsers keep them out.
    allowed_methods, allowed_headers: what such scripts may send, or "*". allow_credentials: cookies too.

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
            raise OptionError(f"port={self.port!r} is no port; use an integer from 0 (a free one) to {2**16 - 1}")
        for name in ("max_queue", "max_body_bytes"):
            if not is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)!r} is not a count; use an integer of at least 1")
        for name, least in (("request_timeout_s", "above 0"), ("drain_s", "of at least 0")):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 86_400 or (value == 0 and name != "drain_s"):
                raise OptionError(f"{name}={value!r} is not a time; use a number of seconds {least}, at most 86400")
        if self.reasoning_parser is not None:
            reasoning_tags(self.reasoning_parser)
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise OptionError(
                f"default_chat_template_kwargs={self.chat_template_kwargs!r} is not an object; use one such as "
                '{"enable_thinking": false}'
            )
        if self.api_key is not None and (not self.api_key or not self.api_key.isprintable()):
            raise OptionError("api_key is empty or has unprintable characters; use another one, or none")
        if not self.served_model_names or not all(self.served_model_names):
            raise OptionError("served_model_names has an empty name; give at least one that is not")
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and (not _ORIGIN.fullmatch(origin) or origin != origin.lower()):
                raise OptionError(
                    f"allowed_origins has {origin!r}, which no browser sends; use scheme://host or scheme://host:port "
                    "in small letters, without a path, or *"
                )
        for name in ("allowed_methods", "allowed_headers"):
            for word in getattr(self, name):
                if not _TOKEN.fullmatch(word):
                    raise OptionError(f"{name} has {word!r}, which is not a valid HTTP token; use one, or * for all")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise OptionError(
                "allow_credentials with allowed_origins '*' would let every web page use its visitors' cookies here, "
                "and browsers refuse it; name the origins"
            )

    def without_effect(self) -> list[str]:
        """One sentence for each option that changes nothing."""
        if self.allowed_origins:
            return []
        set_ones = [name for name in ("allowed_methods", "allowed_headers") if getattr(self, name) != _ALL]
        set_ones += ["allow_credentials"] * self.allow_credentials
        return [f"{name} has no effect without allowed_origins" for name in set_ones]
