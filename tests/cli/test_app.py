"""The command line as its users see it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from antiphon import LLM, SamplingParams, cli
from antiphon.cli import generate as generate_module
from antiphon.cli.start import say


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["antiphon", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def run_apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "antiphon.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.processes
def test_generate_prints_one_json_object_a_prompt_and_the_statistics(one_rank: LLM, tmp_path: Path) -> None:
    prompts = ["Once upon a time", 'A "quoted" prompt', "The ship"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[1:]) + "\n\n")
    arguments = ["--ranks", "2", "--dbo", "on", "--prompt", prompts[0], "--prompts-file", str(tmp_path / "prompts.txt")]
    ended = run_apart("generate", *arguments, "--max-tokens", "6", "--json")
    assert ended.returncode == 0, ended.stderr
    *rows, last = map(json.loads, ended.stdout.splitlines())
    expected = one_rank.generate(prompts, SamplingParams(max_tokens=6))
    assert [row["prompt"] for row in rows] == prompts
    assert [row["token_ids"] for row in rows] == [output.token_ids for output in expected]
    assert [row["text"] for row in rows] == [output.text for output in expected]
    assert {row["finish_reason"] for row in rows} == {"length"}
    assert last["stats"]["steps"] == 6
    assert last["stats"]["steps_by_plan"] == {"serial": 0, "dual": 6}
    for word in ("model:", "ranks:", "transport:", "KV cache:", "dbo:"):
        assert word in ended.stderr


STATS: dict[str, Any] = {
    "steps": 3,
    "steps_by_plan": {"dual": 3},
    "serial_reasons": {},
    "transport": "host-staged",
    "graphs": {"replayed": 0, "padded": 0, "eager_reasons": {}},
    "synchronous_reasons": {},
}


def test_generate_prints_texts_and_a_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["antiphon", "generate", "--prompt", "Once upon a time", "--max-tokens", "8"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert not ended.value.code
    assert printed.out.startswith("Once upon a time")
    assert "auto: off, one rank has no communication to hide" in printed.err
    assert "8 steps: 8 serial (serial because dbo is off: 8)" in printed.err


@pytest.mark.parametrize(
    ("by_plan", "expected"),
    [
        ({}, []),
        ({"serial": {"communication_s": 0, "hidden_s": 0}}, []),
        (
            {"serial": {"communication_s": 1.0, "hidden_s": 0.25}, "dual": {"communication_s": 3.0, "hidden_s": 2.75}},
            ["communication over host-staged: 4.00 s, of which hidden 3.00 s (75%)"],
        ),
        (
            {"dual": {"communication_s": None, "hidden_s": None}},
            [
                "communication over host-staged: not observed, for the host does not see when a GPU's data arrives; "
                "antiphon bench overlap measures how much is hidden"
            ],
        ),
    ],
)
def test_the_summary_claims_nothing_that_was_not_observed(by_plan: dict[str, Any], expected: list[str]) -> None:
    summary = generate_module._summary([], {**STATS, "overlap": by_plan}, 1.0)
    assert summary.splitlines()[2:] == expected


@pytest.mark.parametrize(
    ("replayed", "eager", "synchronous", "expected"),
    [
        (0, {"work on cpu cannot be captured": 3}, {}, []),
        (3, {}, {}, ["3 of 3 steps replayed"]),
        (
            1,
            {"it has prompt tokens": 2},
            {"logprobs": 2, "penalties": 1},
            [
                "1 of 3 steps replayed (eager because it has prompt tokens: 2)",
                "steps that the host waited for: logprobs: 2, penalties: 1",
            ],
        ),
    ],
)
def test_the_summary_says_how_steps_were_launched(
    replayed: int, eager: dict[str, int], synchronous: dict[str, int], expected: list[str]
) -> None:
    graphs = {"replayed": replayed, "padded": replayed, "eager_reasons": eager}
    stats = {**STATS, "overlap": {}, "graphs": graphs, "synchronous_reasons": synchronous}
    assert generate_module._summary([], stats, 1.0).splitlines()[2:] == expected


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_what_stdout_has_no_characters_for_is_escaped(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "Größe 🚀"
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run_here(monkeypatch, "generate", "--prompt", prompt, "--max-tokens", "1", *words) == 0
    stdout.seek(0)
    first = stdout.readline()
    assert json.loads(first)["prompt"] == prompt if words else first.startswith(r"Gr\xf6\xdfe \U0001f680")


def test_what_is_said_is_said_as_it_is() -> None:
    stream = io.StringIO()
    say(Console(file=stream, width=20), "/data/:rocket:/glm[fp8] and more words")
    assert stream.getvalue() == "/data/:rocket:/glm[fp8] and more words\n"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["--prompt TEXT", "--prompts-file FILE"]),
        (["--dbo", "onn"], ["dbo='onn'", "auto, off, on", "'on'?"]),
        (["--transport", "altoall"], ["'alltoall'?"]),
        (["--ranks", "5"], ["num_experts=32", "ranks=5", "1, 2, 4, 8, 16, 32"]),
        (["--temperature", "-1"], ["temperature=-1.0"]),
        (["--max-tokens", "0"], ["max_tokens=0", "1"]),
        (["--model", "/no/such"], ["'/no/such'"]),
        (["--prompts-file", "/no/such"], ["--prompts-file /no/such"]),
        (["--split", "tokens"], ["'token'?"]),
        (["--device", "cuda", "--ranks", "64"], ["device='cuda'", "ranks=64"]),
        (["--no-peer-access", "--transport", "copy-engine", "--ranks", "2"], ["'copy-engine'"]),
        (["--model", "glm-4.5-air"], ["'glm-4.5-air'", "load_format='dummy'"]),
        (["--rank", "2"], ["--rank;", "--ranks?"]),
        (["--enable-dboo"], ["--enable-dboo", "--enable-dbo?"]),
        (["--no-prefix-cache"], ["--no-prefix-cache;", "--no-prefix-caching?"]),
        (["--ranks", "two"], ["--ranks='two'", "an integer"]),
        (["--top-p=high"], ["--top-p='high'", "a number"]),
        (["tiny-deepseek", "--ranks"], ["--ranks", "an integer"]),
        (["tiny-deepseek", "--model", "glm-4.5-air"], ["'tiny-deepseek'"]),
        (["--dbo-end-layer", "7"], ["dbo_end_layer=7", "6 layers", "at most 6"]),
        (["--min-total-tokens-to-split", "-1"], ["min_total_tokens_to_split=-1"]),
        (["--dtype", "half"], ["dtype='half'"]),
        (["--logit-bias", "5"], ["--logit-bias '5'", "JSON"]),
        (["--logit-bias", "{"], ["--logit-bias '{'", "JSON"]),
    ],
)
def test_mistakes_give_one_clear_line(
    arguments: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if not arguments or arguments[0] == "--prompts-file" else ["--prompt", "x"]
    assert run_here(monkeypatch, "generate", *prompt, *arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ")
    assert [name for name in names if name not in line] == []
    assert printed.out == ""


def test_a_prompt_that_is_too_long_gives_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 6000}))
    assert run_here(monkeypatch, "generate", "--prompts-file", str(tmp_path / "long.jsonl")) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("error: prompt 0 has ") and "max_model_len=4096 leaves room for 4095" in last_line


def test_token_ids_of_a_file_run_on_dummy_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.jsonl").write_text('{"prompt": [5, 6, 7]}\n{"prompt": [8]}\n')
    arguments = ["--load-format", "dummy", "--num-layers", "2", "--routing", "uniform", "--max-tokens", "3"]
    arguments += ["--prompts-file", str(tmp_path / "ids.jsonl")]
    assert run_here(monkeypatch, "generate", *arguments, "--json") == 0
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(row["prompt"], row["text"]) for row in rows] == [("", "")] * 2
    assert [len(row["token_ids"]) for row in rows] == [3, 3]
    assert last["stats"]["kv_cache"]["source"] == "the default for CPUs"
    assert run_here(monkeypatch, "generate", *arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.split("\n\n")[0] == " ".join(map(str, rows[0]["token_ids"]))
    assert "cut to 2 layers, dummy weights, routing uniform" in printed.err


@pytest.mark.parametrize("line", ["no json", "{}", '{"prompt": 3}', "[]", '{"prompt": []}'])
def test_a_wrong_line_in_a_prompts_file_is_named(
    line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n' + line)
    assert run_here(monkeypatch, "generate", "--prompts-file", str(tmp_path / "prompts.jsonl")) == 2
    assert 'line 2 is not a JSON object with a text "prompt"' in capsys.readouterr().err


@pytest.mark.slow  # test_engine_failures has the error itself
@pytest.mark.processes
def test_a_lane_that_raises_gives_one_line_and_no_traceback() -> None:
    transport = ["--transport", "tests.support.transports:NoGreenlets", "--dbo", "on", "--ranks", "2"]
    ended = run_apart("generate", "--prompt", "Once upon a time", *transport)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("error: rank ")
    assert "a greenlet reached dispatch layer 1" in ended.stderr


def test_version_and_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == "antiphon 0.1.0\n"
    assert run_here(monkeypatch, "generate", "--help") == 0
    text = capsys.readouterr().out
    for option in (
        "--model",
        "--ranks",
        "--dbo",
        "--transport",
        "--device",
        "--load-format",
        "--no-peer-access",
        "--prompt",
        "--prompts-file",
        "--max-tokens",
        "--json",
    ):
        assert option in text


@pytest.mark.slow  # test_engine_parity solves all with overlap, the test below counts
@pytest.mark.processes
def test_eval_counts_solved_problems_and_compares_with_and_without_overlap() -> None:
    ended = run_apart("eval", "word-problems", "--ranks", "2", "--num", "3", "--compare")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    off, on = result.pop("runs")
    assert (off["dbo"], on["dbo"]) == ("off", "on")
    assert off["solved"] == on["solved"] == result["equal"] == result["problems"] == 3
    assert off["steps_by_plan"]["dual"] == 0 < on["steps_by_plan"]["dual"]
    assert (result["ranks"], result["dtype"]) == (2, "float32")
    for line in ("dbo off: 3 of 3 solved", "dbo on: 3 of 3 solved", "3 of 3 answers have the same tokens"):
        assert line in ended.stderr


def test_eval_counts_what_is_not_solved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(monkeypatch, "eval", "word-problems", "--num", "3", "--max-tokens", "2") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert (result["problems"], [run["solved"] for run in result["runs"]]) == (3, [0])
    assert "equal" not in result
    assert "0 of 3 solved" in printed.err
