"""The scripts in tools/ keep up with the code that they import."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "tools").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_tool_imports(name: str) -> None:
    try:
        tool = import_module(f"tools.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":  # has no wheels for some systems
            raise
        pytest.skip("needs triton")
    assert callable(getattr(tool, "main", None))
