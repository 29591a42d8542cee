"""The server's log: one event per line, as JSON or as key=value, with the fields that are listed here.

Texts of users are never logged: no field holds a prompt, an output, a header or a body. An exception is logged by its
type and place only, because its message may quote what a client sent; `--log-level debug` adds the message. A request
is logged when it ends. uvicorn's access log is off, because it would show query strings.

    logging.config.dictConfig(log_config("json", "info"))
    log_event("request finished", request_id="cmpl-1", status=200, num_prompt=7, num_generated=2, seconds=0.135)
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from datetime import UTC, datetime
from typing import Any

from antiphon.core.errors import EngineError, unknown_value
from antiphon.core.lines import one_line

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FIELDS = (
    *("request_id", "method", "path", "status", "reason", "stream", "param"),
    *("num_prompt", "num_generated", "num_cached", "num_results"),
    *("seconds", "first_token_s", "queue_s", "num_open", "limit", "host", "port", "model", "version", "ranks"),
)

_FIELDS = "antiphon_fields"
_BARE = re.compile(r"[\w.:/@+-]+")  # a value that needs no quotes in key=value
_LONGEST = 256  # characters of a value; request ids and paths come from clients

logger = logging.getLogger("antiphon.server")


def log_event(
    message: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: str | float | bool | None
) -> None:
    """Log one event. message: a fixed text, never built from a request. fields: from `LOG_FIELDS`; `None` is left out.

    error: logged as its type and place. The message of an `EngineError` is added, because it quotes no request.
    """
    unknown = fields.keys() - set(LOG_FIELDS)
    assert not unknown, f"{sorted(unknown)} are not in LOG_FIELDS; add those that may be logged"
    logger.log(level, message, exc_info=error, extra={_FIELDS: fields})


class LineFormatter(logging.Formatter):
    """Formats a record as one line. log_format: one of `LOG_FORMATS`. texts_of_errors: add the texts of exceptions."""

    def __init__(self, log_format: str = "text", texts_of_errors: bool = False) -> None:
        super().__init__()
        self._json = log_format == "json"
        self._texts_of_errors = texts_of_errors

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        words: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in getattr(record, _FIELDS, {}).items():
            if value is not None:
                words[name] = _short(value)
        if record.exc_info and record.exc_info[1] is not None:
            words |= self._error(record.exc_info[1])
        if self._json:
            return json.dumps(words)
        head = f"{words.pop('time')} {words.pop('level').upper():<7} {one_line(words.pop('message'))}"
        return " ".join([head, *(f"{name}={_quoted(value)}" for name, value in words.items() if name != "logger")])

    def _error(self, error: BaseException) -> dict[str, str]:
        frames = traceback.extract_tb(error.__traceback__)
        words = {"error": type(error).__name__}
        if self._texts_of_errors or isinstance(error, EngineError):
            words["error"] += f": {error}"
        if frames:
            words["raised_at"] = " < ".join(f"{one.filename}:{one.lineno} {one.name}" for one in reversed(frames[-12:]))
        return words


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, str) and len(value) > _LONGEST:
        return value[:_LONGEST] + "..."
    return value


def _quoted(value: Any) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


def log_config(log_format: str = "text", log_level: str = "info") -> dict[str, Any]:
    """The settings for `logging.config.dictConfig` and uvicorn's `log_config`: everything to stderr in one format.

    Raises `OptionError` for an unknown format or level.
    """
    for option, value, valid in (("log_format", log_format, LOG_FORMATS), ("log_level", log_level, LOG_LEVELS)):
        if value not in valid:
            raise unknown_value(option, value, valid)
    level = log_level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {"()": LineFormatter, "log_format": log_format, "texts_of_errors": log_level == "debug"}
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "antiphon": {"level": level},
            # At level debug uvicorn would log whole requests.
            "uvicorn": {"level": "INFO" if level == "DEBUG" else level, "handlers": [], "propagate": True},
            "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
            "httpx": {"level": "WARNING"},
        },
    }
