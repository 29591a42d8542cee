"""Of what type an option's value is."""

from __future__ import annotations

from typing import TypeGuard

__all__ = ["is_number", "is_whole"]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether an option's value is an integer; `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether an option's value is a number; `True` is not."""
    return is_whole(value) or isinstance(value, float)
