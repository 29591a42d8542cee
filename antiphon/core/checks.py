"""Checks of a value's type, and whether a text can be sent."""

from __future__ import annotations

from typing import TypeGuard

__all__ = ["is_number", "is_whole", "unicode_fault"]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether an option's value is an integer; `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether an option's value is a number; `True` is not."""
    return is_whole(value) or isinstance(value, float)


def unicode_fault(text: str) -> str:
    """Why a text cannot be written as UTF-8: half a character, as JSON's escapes can make one. Empty if it can be."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return str(error)
    return ""
