"""Every error that Antiphon raises on purpose, and the value checks behind most of them.

An error has fields, and its sentence is made from them:

    raise OptionError(
        f"max_model_len={asked} is too long",
        limit=f"the model has {most} positions",
        remedy=f"use at most {most}",
        option="max_model_len",
        value=asked,
    )
    # max_model_len=9000 is too long: the model has 4096 positions; use at most 4096

Errors that the caller can correct are a `ValueError`; failures of a peer, a lane or the group are a `RuntimeError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeGuard

from antiphon.core.lines import split_lines


class AntiphonError(Exception):
    """Base class of all errors in this package.

    fact: what is wrong. limit: the bound that was violated, or "" if the fact says it all. remedy: what to do, or "" if
    nothing helps. option: the option, parameter or field at fault, as the caller spells it. value: what it was set to.
    """

    def __init__(
        self, fact: str, *, limit: str = "", remedy: str = "", option: str | None = None, value: Any = None
    ) -> None:
        self.fact = fact
        self.limit = limit
        self.remedy = remedy
        self.option = option
        self.value = value
        super().__init__(fact)

    def __str__(self) -> str:
        sentence = f"{self.fact}: {self.limit}" if self.limit else self.fact
        return f"{sentence}; {self.remedy}" if self.remedy else sentence

    def fields(self) -> dict[str, str | None]:
        """The text fields, to rebuild the error in another process by `type(error)(**error.fields())`."""
        return {"fact": self.fact, "limit": self.limit, "remedy": self.remedy, "option": self.option}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fact,), self.__dict__


class OptionError(AntiphonError, ValueError):
    """An option has a value that cannot work."""


class ModelError(AntiphonError, ValueError):
    """A checkpoint, its configuration or its architecture cannot be used."""


class RequestError(AntiphonError, ValueError):
    """A request cannot be served; other requests and the engine are not affected."""


class PromptLengthError(RequestError):
    """A prompt, or a prompt with its output, does not fit into the model's length or the KV cache."""


class UnsupportedError(RequestError):
    """A request uses a feature that Antiphon does not implement."""


class LaneError(AntiphonError, RuntimeError):
    """A lane broke a rule of the runtime: state left changed, a pending not finished, or the wrong order."""


class PeerError(AntiphonError, RuntimeError):
    """A peer rank ended or did not answer in time. Fatal to the group."""


class EngineError(AntiphonError, RuntimeError):
    """The engine has ended; a new one must be created."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to quote in ours; its class name if it has no message."""
    return next((line.strip() for line in split_lines(str(error)) if line.strip()), type(error).__name__)


def unknown_value(option: str, value: object, valid: Iterable[str]) -> OptionError:
    """The error for a value that is not one of `valid`; it names the nearest valid one."""
    names = sorted(valid)
    hint = did_you_mean(value, names)
    return OptionError(
        f"{option}={value!r} is not known", remedy=f"use one of {', '.join(names)}{hint}", option=option, value=value
    )


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """The end of a remedy that asks for the name nearest to `value`; empty if none is near."""
    near = get_close_matches(str(value), list(names), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def out_of_range(option: str, value: object, valid: str) -> OptionError:
    """The error for a number outside `valid`, a range in words such as "2 to 8"."""
    return OptionError(f"{option}={value!r} is out of range", remedy=f"use {valid}", option=option, value=value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number; `True` is not."""
    return is_whole(value) or isinstance(value, float)


def unicode_fault(text: str) -> str:
    """Why a text cannot be encoded as UTF-8, for example a lone surrogate from JSON escapes; "" if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return str(error)
    return ""
