"""Every error that Antiphon raises on purpose. A message states fact, limit and remedy.

`ValueError` family: the caller can mend it. `RuntimeError` family: a peer, a lane or the group failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from antiphon.core.lines import split_lines

__all__ = [
    "AntiphonError",
    "EngineError",
    "LaneError",
    "ModelError",
    "OptionError",
    "PeerError",
    "RequestError",
    "first_line",
    "unknown_value",
]


class AntiphonError(Exception):
    """Base of all errors of this package."""


class OptionError(AntiphonError, ValueError):
    """An option has a value that cannot work."""


class ModelError(AntiphonError, ValueError):
    """A checkpoint, its configuration or its architecture cannot be used."""


class RequestError(AntiphonError, ValueError):
    """A request cannot be served; other requests and the engine are not touched."""


class LaneError(AntiphonError, RuntimeError):
    """A lane broke a rule of the runtime (state left changed, pending not finished, wrong order)."""


class PeerError(AntiphonError, RuntimeError):
    """A peer rank did not answer in time or ended. Fatal to the group."""


class EngineError(AntiphonError, RuntimeError):
    """The engine has ended; a new one must be created."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to be quoted in ours; its class's name if it says nothing."""
    return next((line.strip() for line in split_lines(str(error)) if line.strip()), type(error).__name__)


def unknown_value(option: str, value: object, valid: Iterable[str]) -> OptionError:
    """The error for a value that is not one of `valid`, naming the nearest valid one."""
    names = sorted(valid)
    near = get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return OptionError(f"{option}={value!r} is not known; use one of {', '.join(names)}{hint}")
