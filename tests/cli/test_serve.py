"""What a command line and a file of `antiphon serve` say of the server, and options that are written as sizes."""

from __future__ import annotations

import logging.config
from pathlib import Path
from typing import Any

import pytest

from antiphon.cli import engine_options
from antiphon.config.engine_config import EngineConfig
from antiphon.config.keywords import make_config
from antiphon.config.options import OPTIONS
from antiphon.core.errors import OptionError
from antiphon.server import run
from antiphon.server.options import ServerOptions
from tests.support.asked import AskedError, run_command, stop_before_start
from tests.support.errors import raises


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `antiphon serve` with these words up to where it would listen."""

    def ask(*words: str) -> tuple[EngineConfig, ServerOptions]:
        found: list[Any] = []

        def run_server(config: EngineConfig, options: ServerOptions, **_: Any) -> int:
            found.extend([config, options])
            return 0

        monkeypatch.setattr(run, "run_server", run_server)
        monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)
        run_command(monkeypatch, "serve", *words)
        return found[0], found[1]

    return ask


@pytest.mark.parametrize(
    ("words", "model", "names"),
    [
        (["org/x"], "org/x", ["org/x"]),
        (["org/x", "--served-model-name", "a", "b"], "org/x", ["a", "b"]),
        (["--served-model-name", "a", "b"], "tiny-deepseek", ["a", "b"]),
        (["org/x", "--served-model-name", "a", "b", "--port", "1"], "org/x", ["a", "b"]),
        (["--served_model_name", "a", "b", "--model", "org/x"], "org/x", ["a", "b"]),
        (["org/x", "--served-model-name", "a", "--served-model-name", "b", "c"], "org/x", ["a", "b", "c"]),
        (["org/x", "--served-model-name=a", "b"], "org/x", ["a", "b"]),
        (["org/x", "--served-model-name=a", "--served-model-name=b"], "org/x", ["a", "b"]),
        # As in vLLM: after a space all words are names, after "=" the next one is the model.
        (["--served-model-name", "a", "org/x"], "tiny-deepseek", ["a", "org/x"]),
        (["--served-model-name=a", "org/x"], "org/x", ["a"]),
        (["--served-model-name=-a", "org/x"], "org/x", ["-a"]),
        (["--served-model-name", "a", "b", "--", "org/x"], "org/x", ["a", "b"]),
    ],
)
def test_several_names_after_one_option(words: list[str], model: str, names: list[str], asked: Any) -> None:
    config, options = asked(*words)
    assert config.model == model
    assert options.served_model_names == tuple(names)


@pytest.mark.parametrize(
    ("words", "origins"),
    [
        ([], ()),
        (["--allowed-origins", '["https://a.example", "http://b:8080"]'], ("https://a.example", "http://b:8080")),
        (["--allowed-origins", "https://a.example", "http://b:8080"], ("https://a.example", "http://b:8080")),
        (["--allowed-origins", "https://a.example", "--allowed-origins", "null"], ("https://a.example", "null")),
        (["--allowed-origins", '["*"]'], ("*",)),
    ],
)
def test_origins(words: list[str], origins: tuple[str, ...], asked: Any) -> None:
    _, options = asked("org/x", *words)
    assert options.allowed_origins == origins
    assert (options.allowed_methods, options.allowed_headers, options.allow_credentials) == (("*",), ("*",), False)


def test_lists_and_sizes_of_a_file(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text(
        "served-model-name: [a, b c]\nallowed_origins: https://x.example\nallowed-methods: [GET]\n"
        "allow-credentials: true\nmax-queue: 2k\nmax-model-len: 1K\nkv-cache-memory: 64MiB\nmax-num-seqs: 12\n"
    )
    config, options = asked("--config", str(tmp_path / "o.yaml"), "--max-body-bytes", "1MB")
    assert options.served_model_names == ("a", "b c")
    assert (options.allowed_origins, options.allowed_methods) == (("https://x.example",), ("GET",))
    assert options.allow_credentials and (options.max_queue, options.max_body_bytes) == (2000, 10**6)
    assert (config.max_model_len, config.kv_cache_memory, config.max_num_seqs) == (1024, 2**26, 12)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--served-model-name", "--port", "1"], ["--served-model-name", "NAME"]),
        (["--allowed-origins", "[1]"], ["--allowed-origins=1"]),
        (["--allowed-origins", "[https://x]"], ["--allowed-origins", "JSON", "--allowed-origins a b"]),
        (["--allowed-origins", "https://x.example/"], ["allowed_origins='https://x.example/'", "scheme://host"]),
        (["--allowed-origins", "x.example"], ["allowed_origins='x.example'", "scheme://host"]),
        (["--allowed-origins", "https://X.example"], ["allowed_origins='https://X.example'", "lower case"]),
        (["--allowed-methods", "GET,POST", "--allowed-origins", "*"], ["allowed_methods='GET,POST'", "*"]),
        (["--allow-credentials", "--allowed-origins", "*"], ["allow_credentials", "allowed_origins"]),
        (["--max-model-len", "32,768"], ["--max-model-len", "'32,768'", "32768", "32K"]),
        (["--max-model-len", "1.2345k"], ["--max-model-len", "1234.5"]),
        (["--max-model-len", "auto"], ["--max-model-len", "'auto'"]),
        (["--max-model-len", "-1"], ["max_model_len=-1"]),
        (["--kv-cache-memory", "20Q"], ["--kv-cache-memory", "'20Q'", "20GiB"]),
        (["--max-queue", "0k"], ["max_queue=0"]),
        (["--ranks", "2k"], ["--ranks", "'2k'"]),
    ],
)
def test_mistakes(words: list[str], names: list[str], asked: Any) -> None:
    with raises(OptionError, *names) as ended:
        asked("org/x", *words)
    assert "\n" not in str(ended.error)


def test_cors_options_without_origins_say_that_they_do_nothing() -> None:
    assert ServerOptions().without_effect() == []
    told = ServerOptions(allowed_methods=("GET",), allow_credentials=True).without_effect()
    assert told == [
        f"{name} has no effect without allowed_origins" for name in ("allowed_methods", "allow_credentials")
    ]
    assert ServerOptions(allowed_origins=("https://x.example",), allow_credentials=True).without_effect() == []


# ---- sizes

SIZES = [name for name, one in OPTIONS.items() if one.size in ("count", "bytes")]


def test_the_command_line_and_llm_take_the_same_options_as_sizes() -> None:
    kinds = {name: engine_options._kind(one.annotation) for name, one in engine_options.engine_parameters().items()}
    sizes = {name: kind for name, kind in kinds.items() if kind in ("count", "bytes")}
    assert sizes == {name: OPTIONS[name].size for name in SIZES}
    assert {*sizes.values()} == {"count", "bytes"}
    lists = [name for name, kind in kinds.items() if kind == "sizes"]
    assert lists == [name for name, one in OPTIONS.items() if one.size == "list"] == ["cuda_graph_sizes"]


@pytest.mark.parametrize("name", SIZES)
def test_every_such_option_is_read_on_every_way(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = make_config({name: 2048})
    assert make_config({name: "2K"}) == expected
    (tmp_path / "o.yaml").write_text(f"{name}: 2K\n")
    stop_before_start(monkeypatch)
    for words in ([f"--{name.replace('_', '-')}", "2K"], [f"--{name}=2K"], ["--config", str(tmp_path / "o.yaml")]):
        with pytest.raises(AskedError) as ended:
            run_command(monkeypatch, "generate", "--prompt", "x", *words)
        assert ended.value.config == expected


def test_python_is_told_as_well() -> None:
    for value in (-1, "auto"):
        with raises(OptionError, f"max_model_len={value!r}"):
            make_config({"max_model_len": value})
    with raises(OptionError, "block_size='16x'", option="block_size", value="16x"):
        make_config({"block_size": "16x"})


def test_benches_read_sizes_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from antiphon.bench.serve import load as bench

    found: list[Any] = []

    def run_serve(options: Any) -> None:
        found.append(options.workload)
        raise OptionError("enough")

    monkeypatch.setattr(bench, "run_serve", run_serve)
    words = ["bench", "serve", "--num-prompts", "1k", "--random-input-len", "4K", "--random-output-len", "1"]
    with pytest.raises(OptionError, match="enough"):
        run_command(monkeypatch, *words)
    assert (found[0].num_prompts, found[0].input_len, found[0].output_len) == (1000, 4096, 1)
