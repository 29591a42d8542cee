"""Adding an option touches one file: a copy of the package with one more field in it knows the option everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import antiphon
from tools.option_tables import DOCUMENT, with_tables

ROOT = Path(antiphon.__file__).parents[1]
PLACE = "    debug_order: bool = option("
ADDED = '    reading_lamp: int | None = option(None, size="count", check=_count, help="Brightness of the lamp.")\n'
PROGRAM = """
import inspect
import sys
from pathlib import Path

import antiphon
from antiphon import LLM
from antiphon.cli.arguments import OwnOption, read_config_file
from antiphon.cli.engine_options import engine_parameters
from antiphon.config.keywords import make_config
from antiphon.core.errors import OptionError
from antiphon.core.options import check_options
from tools.option_tables import table

folder = Path(sys.argv[1])
assert Path(antiphon.__file__).is_relative_to(folder)
assert inspect.signature(LLM).parameters["reading_lamp"].annotation == int | str | None
assert "Brightness of the lamp." in LLM.__init__.__doc__
assert engine_parameters()["reading_lamp"].default is None
assert "| `reading_lamp` | `--reading-lamp` |" in table("Steps and memory")
assert make_config({}).reading_lamp is None and make_config({"reading_lamp": "2K"}).reading_lamp == 2048
for wrong in ({"reading_lamb": 1}, {"reading_lamp": 0}, {"reading_lamp": "2X"}):
    try:
        check_options(make_config(wrong))
    except OptionError as error:
        assert "reading_lamp" in str(error), error
    else:
        raise AssertionError(wrong)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=100
    )


def test_an_option_that_is_declared_is_known_everywhere(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "antiphon", tmp_path / "antiphon", ignore=shutil.ignore_patterns("data", "__pycache__"))
    (tmp_path / "antiphon" / "data").symlink_to(ROOT / "antiphon" / "data")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "option_tables.py", tmp_path / "tools")
    without = run(tmp_path, "-c", PROGRAM, str(tmp_path))
    assert without.returncode == 1 and "reading_lamp" in without.stderr  # the test can fail
    declaration = tmp_path / "antiphon" / "config" / "options.py"
    text = declaration.read_text()
    assert PLACE in text
    declaration.write_text(text.replace(PLACE, ADDED + PLACE))
    told = run(tmp_path, "-c", PROGRAM, str(tmp_path))
    assert told.returncode == 0, told.stderr
    helped = run(tmp_path, "-m", "antiphon.cli", "generate", "--help")
    assert "--reading-lamp" in helped.stdout
    (tmp_path / "options.yaml").write_text("reading-lamp: 0k\n")
    by_file = run(tmp_path, "-m", "antiphon.cli", "generate", "--config", "options.yaml", "--prompt", "x")
    assert by_file.returncode != 0 and "reading_lamp=0" in by_file.stderr


def test_the_tables_in_the_documents_are_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert with_tables(text) == text, "run python -m tools.option_tables"
    typed = text.replace("Number of processes that share", "Number of those that share")
    assert typed != text and with_tables(typed) == text  # it is written from the declarations
