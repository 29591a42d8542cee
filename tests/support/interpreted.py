"""A mend of Triton's interpreter, for kernels with `for` loops over `tl.range` whose bounds are loaded."""

from __future__ import annotations

from typing import Any

import pytest
from triton.runtime import interpreter


def mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 makes a loop's bound an int by `int(array of one)`, which numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
