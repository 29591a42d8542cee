"""What the documents name exists, and what they show runs."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

from antiphon import SamplingParams
from antiphon.cli.arguments import OwnOption, read_config_file
from antiphon.config.aliases import FOREIGN_OPTIONS
from antiphon.config.options import OPTION_DEFAULTS
from antiphon.models import PRESETS
from antiphon.models.architectures.registry import READERS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for found, block in fenced if found == language]


def resolve(name: str) -> object:
    """Import `antiphon.a.b.c`, where the last parts may be attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(f"{name} cannot be imported")


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_dotted_name_imports(document: Path) -> None:
    for name in set(re.findall(r"\bantiphon(?:\.[A-Za-z_]\w*)+", document.read_text())):
        if not name.endswith((".py", ".yml")):
            resolve(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_link_and_path_exists(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:antiphon|tests|docs|tools|examples|constraints)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_no_workplace_is_mentioned(document: Path) -> None:
    assert not re.search(r"\.\./shared|/work/|subagent", document.read_text())


def options_in(command: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", command)


def test_every_shown_command_has_its_options() -> None:
    shown = [
        line
        for document in DOCUMENTS
        for block in blocks(relative(document), "") + blocks(relative(document), "console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("antiphon ")
    ]
    assert shown
    known: dict[tuple[str, ...], set[str]] = {}
    for command in shown:
        words = shlex.split(command.partition("#")[0])[1:]
        names = tuple(itertools.takewhile(lambda word: not word.startswith("-"), words))
        if names not in known:
            known[names] = set(options_in(run([sys.executable, "-m", "antiphon.cli", *names, "--help"])))
        assert set(options_in(command)) <= known[names], command


def rows(document: str, heading: str) -> list[list[str]]:
    """Cells of the tables under a heading, without heads and rules."""
    text = (ROOT / document).read_text().partition(f"{heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_tables_of_options_are_complete_and_right() -> None:
    table = rows("docs/options.md", "# Options")
    printed = set(options_in(run([sys.executable, "-m", "antiphon.cli", "generate", "--help"])))
    assert set(options_in(" ".join(row[1] for row in table))) <= printed
    assert {name for row in table for name in re.findall(r"\w+", row[0])} == set(OPTION_DEFAULTS)
    shown = {re.findall(r"\w+", row[0])[0]: row[2].strip("`") for row in table}
    for name, default in OPTION_DEFAULTS.items():
        if name in shown and default is not None and name != "dbo_start_layer":
            assert shown[name] == str(default).removesuffix(".0"), name


def test_the_table_of_other_engines_options_is_complete() -> None:
    table = rows("docs/options.md", "## Options of other engines")
    shown = {name for row in table for name in re.findall(r"(?<![\w-])--?[a-z][\w-]*", row[0])}
    own = {as_flag(name) for name in OPTION_DEFAULTS}
    foreign = {as_flag(name) for option in FOREIGN_OPTIONS for name in option.names}
    assert shown <= own | foreign
    for option in FOREIGN_OPTIONS:
        assert as_flag(option.name) in shown, option.name


def as_flag(name: str) -> str:
    return ("-" if len(name) == 2 else "--") + name.replace("_", "-")


def test_the_file_of_options_in_the_documents_is_read(tmp_path: Path) -> None:
    (text,) = blocks("docs/options.md", "yaml")
    (tmp_path / "options.yaml").write_text(text)
    options = [
        OwnOption(name=name, kind=kind, flags=(as_flag(name),))
        for name, kind in {"model": "text", "ranks": "whole", "dbo": "text", "prefix_caching": "flag"}.items()
    ]
    found = read_config_file(str(tmp_path / "options.yaml"), options)
    assert found.own == {"model": "tiny-deepseek", "ranks": 2, "dbo": "on", "prefix_caching": False}


def test_the_table_of_architectures_is_complete() -> None:
    table = rows("docs/models.md", "# Models")
    architectures = {row[0].strip("`"): set(re.findall(r"[\w.-]+", row[2])) for row in table}
    assert set(architectures) == set(READERS)
    assert set.union(*architectures.values()) == set(PRESETS)


def test_the_table_of_sampling_parameters_is_complete() -> None:
    table = rows("docs/offline.md", "## Prompts and requests")
    assert {name for row in table for name in re.findall(r"\w+", row[0])} == {f.name for f in fields(SamplingParams)}


@pytest.mark.processes
def test_the_command_in_the_readme_runs() -> None:
    (command,) = [b for b in blocks("README.md", "") if b.startswith("antiphon generate")]
    assert "Once upon a time" in run([sys.executable, "-m", "antiphon.cli", *shlex.split(command)[1:]])


@pytest.mark.processes
@pytest.mark.parametrize(
    ("document", "marker"),
    [
        ("README.md", "with LLM("),
        pytest.param("docs/offline.md", "with LLM(", marks=pytest.mark.slow),
        ("docs/doctor.md", "examine"),
    ],
)
def test_the_python_examples_run(document: str, marker: str, tmp_path: Path) -> None:
    (example,) = [block for block in blocks(document, "python") if marker in block]
    (tmp_path / "example.py").write_text(example)
    assert run([sys.executable, str(tmp_path / "example.py")]).strip()


def run_library_example(**environment: str) -> str:
    (command,) = [b for b in blocks("docs/library.md", "") if b.startswith("torchrun")]
    arguments = ["--standalone", *shlex.split(command)[1:]]
    return run([sys.executable, "-m", "torch.distributed.run", *arguments], **environment)


@pytest.mark.processes
def test_the_library_example_runs_under_torchrun() -> None:
    printed = run_library_example(CUDA_VISIBLE_DEVICES="")
    assert printed.count("on cpu over alltoall: two lanes give what one lane gives") == 2


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_library_example_takes_the_gpus() -> None:
    printed = run_library_example()
    assert len(re.findall(r"on cuda:[01] over (one-sided|host-staged): two lanes give", printed)) == 2


def test_code_in_the_readme_is_the_code_of_the_package() -> None:
    moe = (ROOT / "antiphon/models/moe.py").read_text()
    for document in ("README.md", "docs/step.md"):
        (block,) = [b for b in blocks(document, "python") if "self.experts.dispatch" in b]
        for line in block.splitlines():
            if not line.startswith(("return", "shared_TD")):
                assert line.partition("#")[0].strip() in moe, line


def test_the_step_in_the_documents_is_the_step_of_the_package() -> None:
    step = (ROOT / "antiphon/engine/step.py").read_text()
    (block,) = [b for b in blocks("docs/step.md", "python") if "next_batch" in b]
    assert len(block.splitlines()) == 6
    for line in block.splitlines():
        assert line.partition("#")[0].partition(", ...")[0].strip() in step, line


def test_the_picture_of_the_rooms_is_of_these_imports() -> None:
    run([sys.executable, str(ROOT / "tools/draw_rooms.py"), "--check"])


def test_no_placeholder_is_left() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"\b(RESULT|NUMBERS|TODO|TBD)\b", document.read_text()), document


def test_the_library_loads_nothing_of_the_engine() -> None:
    code = (
        "import sys, antiphon.runtime, antiphon.comm\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('antiphon.')}\n"
        "print(sorted(rooms))\n"
        "assert 'transformers' not in sys.modules"
    )
    assert run([sys.executable, "-c", code]).strip() == "['comm', 'core', 'device', 'kernels', 'machine', 'runtime']"


def run(command: list[str], **settings: str) -> str:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "200", **settings}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
