"""The page for operators and the Dockerfile say what the server does and what the package needs."""

from __future__ import annotations

import json
import re
import tomllib
from inspect import signature
from pathlib import Path
from typing import Any

from antiphon.cli.serve import serve
from antiphon.server.logs import LOG_FIELDS
from antiphon.server.options import ServerOptions
from antiphon.server.service import Phase

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operate.md").read_text()


def rows(section: str) -> list[list[str]]:
    """Cells of the tables of a section, without heads and rules."""
    text = PAGE.partition(f"# {section}\n")[2].partition("\n## ")[0]
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines if not line.startswith((" ---", " option"))]


def test_the_table_of_the_servers_options_is_complete_and_right() -> None:
    defaults: dict[str, Any] = {
        name: parameter.default for name, parameter in signature(serve).parameters.items() if name != "engine"
    }
    told = {row[0].strip("`-").replace("-", "_"): row[1].strip("`") for row in rows("Operating the server")}
    assert told.keys() == defaults.keys()
    for name, default in defaults.items():
        if default is not None:
            assert told[name] == str(default).removesuffix(".0"), name
    made = ServerOptions()
    assert (made.host, made.port, made.max_queue) == (defaults["host"], defaults["port"], defaults["max_queue"])


def test_every_status_that_the_server_answers_is_explained() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "antiphon/server").glob("*.py"))
    answered = {int(status) for status in re.findall(r"ApiError\(\s*(\d{3})", sources)}
    explained = {int(status) for row in rows("Errors") for status in re.findall(r"\b[45]\d\d\b", row[0])}
    assert answered and answered <= explained
    assert {503, 429, 401} <= answered  # the search finds them


def test_fields_and_phases_that_the_page_names_exist() -> None:
    (logs,) = re.findall(r"When a request ends, its line has (.*?)\.\n", PAGE, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", logs)) <= set(LOG_FIELDS)
    assert "draining" in {str(phase) for phase in Phase} and "| serving or draining |" in PAGE


def test_the_image_holds_what_the_package_needs() -> None:
    dockerfile, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    sources = {
        name for line in re.findall(r"^COPY (.*)$", dockerfile, flags=re.MULTILINE) for name in line.split()[:-1]
    }
    assert ignored[0] == "*" and {f"!{name}" for name in sources} <= set(ignored)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "antiphon", project["readme"], *project["license-files"]} <= sources
    assert all((ROOT / name).exists() for name in sources)


def test_the_image_runs_the_server_where_it_can_be_reached() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (command,) = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, flags=re.MULTILINE)
    assert json.loads(command) == ["antiphon", "serve", "--host", "0.0.0.0"]
    port = signature(serve).parameters["port"].default
    assert f"EXPOSE {port}\n" in dockerfile and f"127.0.0.1:{port}/health" in dockerfile
