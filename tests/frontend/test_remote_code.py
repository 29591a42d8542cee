"""No code of a checkpoint is ever executed, whatever standard input says."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import antiphon
from antiphon import LLM
from antiphon.accuracy.lm_eval_model import AntiphonLM
from antiphon.config.engine_config import EngineConfig
from antiphon.core.errors import ModelError, RequestError
from antiphon.frontend.async_engine import AsyncEngine
from antiphon.frontend.tokenizer import _NEVER, Tokenizer
from tests.support.checkpoints import copy_bundled, rewrite_json
from tests.support.errors import raises

CLASSES = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that the checkpoint's code would write."""
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(tmp_path: Path, marker: Path) -> Path:
    """A checkpoint with good weights, a good `tokenizer.json`, and code that its config files name."""
    folder = copy_bundled(tmp_path, auto_map=CLASSES, tokenizer_class="Evil")
    classes = {"AutoConfig": "tokenization_evil.Evil", "AutoModelForCausalLM": "tokenization_evil.Evil", **CLASSES}
    rewrite_json(folder / "config.json", auto_map=classes, model_type="evil")
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Evil\n"
    for name in ("tokenization_evil.py", "modeling_evil.py", "configuration_evil.py"):
        (folder / name).write_text(code)
    return folder


COMMANDS = {
    "generate": ["-m", "antiphon.cli", "generate", "--prompt", "Once", "--max-tokens", "2"],
    "generate, as vLLM's users say it": [
        *("-m", "antiphon.cli", "generate", "--prompt", "Once", "--max-tokens", "2", "--trust-remote-code"),
    ],
    "eval": ["-m", "antiphon.cli", "eval", "word-problems", "--num", "1", "--max-tokens", "2"],
    "lm_eval": ["-m", "antiphon.accuracy.lm_eval", "--model", "antiphon", "--tasks", "word_problems", "--limit", "1"],
}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("generate", True),
        *[
            pytest.param(name, whole, marks=pytest.mark.slow)
            for name in COMMANDS
            for whole in (True, False)
            if (name, whole) != ("generate", True)
        ],
    ],
)
def test_a_yes_on_standard_input_executes_nothing(checkpoint: Path, marker: Path, name: str, whole: bool) -> None:
    if not whole:
        (checkpoint / "tokenizer.json").unlink()
    words = COMMANDS[name]
    words = [*words, *(["--model_args", f"model={checkpoint}"] if name == "lm_eval" else ["--model", str(checkpoint)])]
    ended = subprocess.run(
        [sys.executable, *words], input="y\n" * 9, capture_output=True, text=True, timeout=110, check=False
    )
    assert not marker.exists(), f"code of the checkpoint was executed\n{ended.stdout}\n{ended.stderr}"
    if whole:
        assert ended.returncode == 0, ended.stderr
    else:
        assert ended.returncode == 2, ended.stdout
        assert "tokenization_evil.Evil" in ended.stderr and "tokenizer.json" in ended.stderr


class StartedError(Exception):
    """Raised instead of starting the ranks, when the tokenizer has been loaded."""


def by_llm(checkpoint: Path) -> object:
    return LLM(str(checkpoint), trust_remote_code=True)


def by_the_server(checkpoint: Path) -> object:
    return AsyncEngine(EngineConfig(model=str(checkpoint)))


def by_lm_eval(checkpoint: Path) -> object:
    return AntiphonLM(model=str(checkpoint), trust_remote_code=True)


@pytest.mark.parametrize("start", [by_llm, by_the_server, by_lm_eval])
@pytest.mark.parametrize("whole", [True, False], ids=["with tokenizer.json", "without"])
def test_starting_an_engine_executes_nothing(
    checkpoint: Path, marker: Path, start: Callable[[Path], object], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise StartedError

    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("antiphon.frontend.async_engine.WorkerClient", stop)
    if not whole:
        (checkpoint / "tokenizer.json").unlink()
        with raises(ModelError, "tokenization_evil.Evil"):
            start(checkpoint)
    elif start is by_the_server:
        with pytest.raises(StartedError):
            start(checkpoint)
    else:
        start(checkpoint).close()  # type: ignore[attr-defined]
    assert not marker.exists()


def test_only_code_is_refused_with_what_to_do(checkpoint: Path, marker: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with raises(ModelError, "tokenization_evil.Evil", option="model", remedy="tokenizer.json"):
        Tokenizer(str(checkpoint))
    assert not marker.exists()


@pytest.mark.parametrize("auto_map", [CLASSES["AutoTokenizer"], {"AutoTokenizer": [None, "x.Evil"]}, [None, None], {}])
def test_older_ways_to_ask_for_code(checkpoint: Path, marker: Path, auto_map: object) -> None:
    rewrite_json(checkpoint / "tokenizer_config.json", auto_map=auto_map)
    assert Tokenizer(str(checkpoint)).encode("Once", add_special_tokens=False)
    (checkpoint / "tokenizer.json").unlink()
    with raises(ModelError, option="model", value=str(checkpoint), remedy="tokenizer.json"):
        Tokenizer(str(checkpoint))
    assert not marker.exists()


def test_a_tokenizer_json_is_loaded_as_it_is(tmp_path: Path) -> None:
    """Whatever class its config names, known or not."""
    plain = Tokenizer(str(copy_bundled(tmp_path / "plain")))
    text = "Once upon a time, né 😊"
    for number, name in enumerate(["LlamaTokenizerFast", "LlamaTokenizer", "Nobody", None]):
        other = Tokenizer(str(copy_bundled(tmp_path / str(number), tokenizer_class=name)))
        assert other.encode(text) == plain.encode(text) and other.decode(plain.encode(text)) == text
        assert other.eos_token_id == 2


def test_every_call_that_loads_with_transformers_forbids_code() -> None:
    """The product calls `from_pretrained` in one place, which forbids downloads and code."""
    calls = []
    for path in sorted(Path(antiphon.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("from_"):
                calls += [(path.name, ast.unparse(node))] if "pretrained" in ast.unparse(node.func) else []
    assert calls == [("tokenizer.py", "kind.from_pretrained(str(folder), **_NEVER)")]

    assert _NEVER == {"local_files_only": True, "trust_remote_code": False}


def test_a_chat_template_cannot_reach_out(tmp_path: Path, marker: Path) -> None:
    """Templates are programs too, but run in a sandbox."""
    for number, attack in enumerate(
        [
            "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append('x') }}",
        ]
    ):
        tokenizer = Tokenizer(str(copy_bundled(tmp_path / str(number), chat_template=attack)))
        with raises(RequestError, option="messages", remedy="chat_template_kwargs"):
            tokenizer.chat([{"role": "user", "content": "Hello"}])
        assert not marker.exists()


def test_a_hub_model_is_downloaded_without_its_code() -> None:
    from fnmatch import fnmatch

    from antiphon.models.checkpoint import hub

    for name in ("tokenization_evil.py", "tokenizer.py", "tokenizer_evil.py", "modeling.py", "pytorch_model.bin"):
        wanted = any(fnmatch(name, pattern) for pattern in hub._ALL_FILES)
        assert not wanted or any(fnmatch(name, pattern) for pattern in hub._NOT_LOADED), name
