"""The server and the clients in the docs work as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from antiphon.server.protocol import ChatRequest, CompletionRequest
from tests.support.server import ServerProcess

ROOT = Path(__file__).parents[2]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


@pytest.mark.processes
@pytest.mark.timeout(180)
@pytest.mark.parametrize("document", ["README.md", "docs/serve.md"])
def test_the_client_in_the_documents_gets_an_answer(server: ServerProcess, document: str, tmp_path: Path) -> None:
    (example,) = [block for block in blocks(document, "python") if "OpenAI(" in block]
    assert "http://127.0.0.1:8000/v1" in example, "the default port"
    (tmp_path / "example.py").write_text(example.replace("http://127.0.0.1:8000", server.url))
    ended = subprocess.run(
        [sys.executable, tmp_path / "example.py"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.split()) > 5


def test_the_readme_shows_it_in_six_lines() -> None:
    (example,) = [block for block in blocks("README.md", "python") if "OpenAI(" in block]
    (command,) = [block for block in blocks("README.md", "") if block.startswith("antiphon serve")]
    assert command == "antiphon serve --ranks 2 --dbo on\n"
    assert sum(bool(line) for line in (command + example).splitlines()) <= 6


def test_every_parameter_is_in_the_document() -> None:
    text = (ROOT / "docs/serve.md").read_text()
    named = set(re.findall(r"`(\w+)`", text)) | {"stream_options"}
    assert "`stream_options.include_usage`" in text
    assert (set(CompletionRequest.model_fields) | set(ChatRequest.model_fields)) - {"model"} <= named


@pytest.mark.processes
def test_every_path_is_in_the_document(server: ServerProcess) -> None:
    text = (ROOT / "docs/serve.md").read_text()
    for path in server.get("/openapi.json").json()["paths"]:
        assert path.replace("{name}", "NAME") in text, path
