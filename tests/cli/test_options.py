"""Our options on the command line and in a file: all of them reach the engine, and mistakes are named."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from antiphon.cli import engine_options, evaluate
from antiphon.cli import generate as generate_module
from antiphon.config.engine_config import EngineConfig
from antiphon.config.keywords import make_config
from antiphon.config.options import OPTION_DEFAULTS, OPTIONS
from antiphon.core.errors import OptionError
from antiphon.core.options import Option
from antiphon.core.policy import OverlapPolicy
from antiphon.core.sampling import SamplingParams
from tests.support.asked import AskedError, run_command, stop_before_start
from tests.support.errors import raises

TEXTS = {
    "model": "org/name",
    "revision": "v2",
    "load_format": "dummy",
    "routing": "uniform",
    "device": "cpu",
    "dbo": "on",
    "transport": "alltoall",
    "dtype": "float64",
    "split": "request-boundary",
    "attention_backend": "torch",
}


def other_value(one: Option) -> Any:
    """A valid value of the option that is not its default."""
    if one.name in TEXTS:
        return TEXTS[one.name]
    if one.type is bool:
        return not one.default
    return one.default / 2 if one.type is float else (one.default or 4) + 1


OTHER_VALUES = {name: other_value(one) for name, one in OPTIONS.items()}


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_before_start(monkeypatch)


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> EngineConfig:
    with pytest.raises(AskedError) as ended:
        run_command(monkeypatch, "generate", "--prompt", "x", *words)
    return ended.value.config


def config_of(**options: Any) -> EngineConfig:
    return make_config(options)


def as_word(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


def test_the_declared_options_and_defaults_are_those_of_llm() -> None:
    parameters = engine_options.engine_parameters()
    declared = {name: p.default for name, p in parameters.items() if name not in ("model_argument", "config")}
    assert declared == dict(OPTION_DEFAULTS)
    assert not [name for name, value in OTHER_VALUES.items() if value == OPTION_DEFAULTS[name]]


@pytest.mark.usefixtures("no_start")
def test_without_options_the_defaults_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch) == EngineConfig()


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_option_reaches_the_engine(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    value = OTHER_VALUES[name]
    expected = config_of(**{name: value})
    assert expected != EngineConfig()
    assert asked(monkeypatch, as_word(name, value)) == expected
    file = tmp_path / "options.yaml"
    shown = str(value).lower() if isinstance(value, bool) else value
    for written in (name, name.replace("_", "-")):
        file.write_text(f"# a comment\n\n{written}: {shown}\n")
        assert asked(monkeypatch, "--config", str(file)) == expected


@pytest.mark.usefixtures("no_start")
def test_the_model_may_stand_alone_and_names_may_have_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, "org/name", "--max_num_seqs", "5") == config_of(model="org/name", max_num_seqs=5)


@pytest.mark.usefixtures("no_start")
def test_a_value_that_looks_like_an_option_stays_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, "--stop", "--enable-dbo").policy.dbo == "auto"
    assert asked(monkeypatch, "--", "--enable-dbo").model == "--enable-dbo"


# ---- the file


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("ranks: 4\nseed: 3", ["--ranks", "2"], {"ranks": 2, "seed": 3}),
        ("ranks: 4", ["-dp", "2"], {"ranks": 2}),
        ("data-parallel-size: 4", ["--ranks", "2"], {"ranks": 2}),
        ("data-parallel-size: 4", ["-dp", "2"], {"ranks": 2}),
        (
            "dbo: off",
            ["--enable-dbo"],
            {"dbo": "on", "dbo_decode_token_threshold": 32, "dbo_prefill_token_threshold": 512},
        ),
        ("dbo: on", [], {"dbo": "on"}),
        ("dbo: 'off'", [], {"dbo": "off"}),
        ("revision: 1234", [], {"revision": "1234"}),
        ("prefix-caching: true", ["--no-prefix-caching"], {"prefix_caching": False}),
        ("no-prefix-caching: true", [], {"prefix_caching": False}),
        ("no-prefix-caching: true", ["--prefix-caching"], {}),
        ("enable-prefix-caching: false", [], {"prefix_caching": False}),
        ("num-layers: null", [], {}),
        ("imbalance-ratio: 1", [], {"imbalance_ratio": 1.0}),
        ("model: org/file", ["org/name"], {"model": "org/name"}),
        ("compilation-config: {cudagraph_mode: none}", [], {"enforce_eager": True}),
        ("max-cudagraph-capture-size: 8", ["--cuda-graph-sizes", "1", "2"], {"cuda_graph_sizes": "1,2"}),
        ("cuda-graph-sizes: [1, 2]", ["--cuda-graph-sizes", "4,8"], {"cuda_graph_sizes": "4,8"}),
        ("", [], {}),
    ],
)
def test_the_command_line_wins_over_the_file(
    text: str, words: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "options.yaml").write_text(text)
    assert asked(monkeypatch, f"--config={tmp_path / 'options.yaml'}", *words) == config_of(**expected)


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("text", "names", "option", "remedy"),
    [
        ("seed: 1\nrank: 2", ["line 2", "'rank'"], "rank", "'ranks'"),
        ("ranks: two", ["line 1, ranks='two'"], "ranks", "an integer"),
        ("ranks: '2'", ["line 1, ranks='2'"], "ranks", "an integer"),
        ("ranks: true", ["line 1, ranks=True"], "ranks", "an integer"),
        ("ranks: [2]", ["line 1, ranks=[2]"], "ranks", "an integer"),
        ("timeout-s: soon", ["line 1, timeout_s='soon'"], "timeout_s", "a number"),
        ("prefix-caching: 1", ["line 1, prefix_caching=1"], "prefix_caching", "true or false"),
        ("dbo: [on]", ["line 1, dbo=[True]"], "dbo", "a text"),
        ("dbo: onn", ["dbo='onn'"], "dbo", "'on'"),
        ("stop: [{}]", ["line 1, stop={}"], "stop", "a text"),
        ("ranks: 2\nseed: 1\nranks: 4", ["line 3", "ranks"], "ranks", "one of them"),
        ("data-parallel-size: 2\nranks: 4", ["data_parallel_size=2", "ranks=2", "ranks=4"], "ranks", "one of them"),
        ("tensor-parallel-size: 2", ["tensor_parallel_size=2"], "tensor_parallel_size", "ranks=N"),
        ("enable-dbo: 1", ["line 1, enable_dbo=1"], "enable_dbo", "true or false"),
        ("additional-config: text", ["line 1, additional_config='text'"], "additional_config", "JSON"),
        ("config: other.yaml", ["line 1", "'config'"], "config", ""),
        ("- ranks", ["options.yaml"], "--config", "`ranks: 2`"),
        ("ranks: [", ["line 1", "YAML"], "--config", ""),
        ("a: b: c", ["line 1", "YAML"], "--config", ""),
        ("seed: " + 2000 * "[" + 2000 * "]", ["options.yaml"], "--config", "one option per line"),
        ("seed: 1\nmodel: a\x07b", ["line 2", r"'\x07'"], "--config", ""),
        ("seed: 1\nrevision: 2024-13-01", ["line 2, revision", "month"], "revision", "quote"),
        ("ranks: !!bool perhaps", ["line 1, ranks", "type"], "ranks", "quote"),
        ("ranks: !!timestamp x", ["line 1, ranks", "type"], "ranks", "quote"),
        ("ranks: 1" + ":00" * 200 + ".0", ["line 1, ranks", "type"], "ranks", "quote"),
    ],
)
def test_mistakes_in_the_file(
    text: str, names: list[str], option: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "options.yaml").write_text(text)
    with raises(OptionError, *names, option=option, remedy=remedy) as ended:
        run_command(monkeypatch, "generate", "--prompt", "x", "--config", str(tmp_path / "options.yaml"))
    assert "\n" not in str(ended.error)


def test_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(OptionError, "/no/such.yaml", option="--config"):
        run_command(monkeypatch, "generate", "--prompt", "x", "--config", "/no/such.yaml")


# ---- the commands


class SampledError(Exception):
    """Raised in place of a run."""


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `generate` hands to the engine: prompts and parameters."""
    handed: list[Any] = []

    def generate(prompts: Any, params: Any, **_: Any) -> None:
        handed.extend([prompts, params])
        raise SampledError

    @contextmanager
    def started(console: object, engine: dict[str, Any]) -> Iterator[Any]:
        yield SimpleNamespace(generate=generate)

    monkeypatch.setattr(generate_module, "started", started)
    return handed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--max-tokens", "5", "--min-tokens", "2"], {"max_tokens": 5, "min_tokens": 2}),
        (["--temperature", "0.5", "--top-k", "4", "--top-p", "0.9"], {"temperature": 0.5, "top_k": 4, "top_p": 0.9}),
        (["--min-p", "0.1", "--n", "3", "--ignore-eos"], {"min_p": 0.1, "n": 3, "ignore_eos": True}),
        (
            ["--presence-penalty", "1", "--frequency-penalty", "-1"],
            {"presence_penalty": 1.0, "frequency_penalty": -1.0},
        ),
        (["--repetition-penalty", "1.5", "--logprobs", "2"], {"repetition_penalty": 1.5, "logprobs": 2}),
        (["--stop", "a", "--stop", "b c"], {"stop": ["a", "b c"]}),
        (["--stop-token-ids", "7", "--stop-token-ids", "8"], {"stop_token_ids": [7, 8]}),
        (["--logit-bias", '{"5": -100}'], {"logit_bias": {5: -100}}),
        (["--seed", "3"], {"seed": 3}),
    ],
)
def test_sampling_options_reach_the_request(
    words: list[str], expected: dict[str, Any], sampled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SampledError):
        run_command(monkeypatch, "generate", "--prompt", "one", "--prompt", "two", *words)
    prompts, params = sampled
    options = {"max_tokens": 64, "seed": 0} | expected
    assert prompts == ["one", "two"]
    assert params == [SamplingParams(**options), SamplingParams(**options | {"seed": options["seed"] + 1})]


def test_sampling_options_of_a_file_reach_the_request(
    sampled: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "o.yaml").write_text("temperature: 1\nstop: [a, b]\nstop-token-ids: 7\nprompt: Once\nmax-tokens: 3\n")
    with pytest.raises(SampledError):
        run_command(monkeypatch, "generate", "--config", str(tmp_path / "o.yaml"), "--max-tokens", "4")
    prompts, params = sampled
    assert prompts == ["Once"]
    assert params == [SamplingParams(temperature=1, stop=["a", "b"], stop_token_ids=[7], max_tokens=4, seed=0)]


def test_every_sampling_parameter_has_an_option_or_is_for_python_only() -> None:
    options = set(inspect.signature(generate_module.generate).parameters) | {"seed"}
    python_only = {"return_logits", "return_prompt_logits", "prompt_logprobs", "include_stop_str_in_output"}
    assert {field.name for field in fields(SamplingParams)} - options == python_only


@pytest.mark.usefixtures("no_start")
def test_eval_takes_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AskedError) as ended:
        run_command(monkeypatch, "eval", "word-problems", "org/name", "-dp", "2", "--dbo", "on", "--num", "4")
    assert ended.value.config == config_of(model="org/name", ranks=2, dbo="on")
    assert ended.value.config.policy == OverlapPolicy(dbo="on")
    with raises(OptionError, "--nun", "--num"):
        run_command(monkeypatch, "eval", "word-problems", "--nun", "4")
    assert evaluate.word_problems.__doc__
