"""`raises`: expects one of Antiphon's errors by its fields, so that wording can be mended without touching tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from antiphon.core.errors import AntiphonError

ANY: Any = object()
"""Any value of a field will do."""


class Raised:
    """Holds the error once the `with` block of `raises` has ended."""

    error: AntiphonError


@contextmanager
def raises(
    kind: type[AntiphonError],
    *names: str,
    option: str | None = None,
    value: Any = ANY,
    remedy: str = "",
) -> Iterator[Raised]:
    """Expect an error of exactly `kind` that says what to do.

    names: identifiers and numbers that its sentence must contain, never prose. option, value: its fields; `value` is
    compared only where it is given. remedy: an identifier or number that the remedy must contain.
    """
    raised = Raised()
    with pytest.raises(kind) as caught:
        yield raised
    error = raised.error = caught.value
    assert type(error) is kind, repr(error)
    if option is not None:
        assert error.option == option, f"option {error.option!r}: {error}"
    if value is not ANY:
        assert error.value == value, f"value {error.value!r}: {error}"
    for name in names:
        assert name in str(error), f"{name!r} is not in: {error}"
    assert remedy in error.remedy, f"{remedy!r} is not in the remedy {error.remedy!r}"
