"""lm_eval with an engine: the harness gets the model's own results, with overlap off and on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'antiphon[eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from antiphon import LLM
from antiphon.accuracy import lm_eval as command
from antiphon.accuracy.evaluate import word_problems
from antiphon.accuracy.lm_eval_model import AntiphonLM, load_word_problems
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import OptionError
from tests.support.errors import raises

TEXTS = [
    "Once upon a time there was a fox named Ruby, who lived in a small house by the river.",
    "Question: Ben has 3 boxes with 4 apples each. How many apples does Ben have?\nAnswer: Ben has 3 * 4 = 12 apples.",
    "Über",
]


def test_problems_may_contain_unusual_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = "a\u2028b\x85c\u2029"
    rows = [{"question": question, "answer": "#### 7"}] * 33
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "word_problems.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    monkeypatch.setattr("antiphon.accuracy.evaluate.bundled_model", lambda: tmp_path)
    assert [(one.question, one.number) for one in word_problems()] == [(question, "7")] * 33
    assert list(load_word_problems()["examples"]) == rows[:32] and list(load_word_problems()["test"]) == rows[32:]


@pytest.fixture(scope="module")
def tasks() -> TaskManager:
    return TaskManager(include_path=str(command.TASKS), include_defaults=False)  # there are thousands


@pytest.fixture
def lm(one_rank: LLM) -> AntiphonLM:
    return AntiphonLM(llm=one_rank)


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    yield AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


def reference_logprobs(model: Any, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For every token but the first: its logprob, and whether it is the likeliest."""
    with torch.inference_mode():
        logprobs_TV = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    targets_T = torch.tensor(token_ids[1:])
    return logprobs_TV[torch.arange(len(targets_T)), targets_T], logprobs_TV.argmax(-1) == targets_T


def evaluate(lm: AntiphonLM, tasks: TaskManager, **settings: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(  # type: ignore[no-any-return]
        lm, tasks=["word_problems"], task_manager=tasks, bootstrap_iters=0, confirm_run_unsafe_code=False, **settings
    )


def scores_of(found: dict[str, Any]) -> list[float]:
    scores = found["results"]["word_problems"]
    return [scores["exact_match,strict-match"], scores["exact_match,flexible-extract"]]


@pytest.mark.slow
@pytest.mark.processes
def test_scores_are_equal_with_overlap_off_and_on(two_ranks: LLM, tasks: TaskManager) -> None:
    lm = AntiphonLM(llm=two_ranks)
    scores, texts, num_dual = {}, {}, {}
    for dbo in ("off", "on"):
        two_ranks.reconfigure(dbo=dbo)
        before = two_ranks.stats()["steps_by_plan"].get("dual", 0)
        plain = evaluate(lm, tasks, limit=4)
        chat = evaluate(lm, tasks, limit=8, apply_chat_template=True, fewshot_as_multiturn=True)
        num_dual[dbo] = two_ranks.stats()["steps_by_plan"]["dual"] - before
        scores[dbo] = [scores_of(found) for found in (plain, chat)]
        texts[dbo] = [[sample["resps"] for sample in found["samples"]["word_problems"]] for found in (plain, chat)]
    two_ranks.reconfigure(dbo="auto")
    assert num_dual["off"] == 0 < num_dual["on"]
    assert scores["off"] == scores["on"]
    assert texts["off"] == texts["on"]
    plain_scores, chat_scores = scores["on"]
    assert plain_scores == [1.0, 1.0]
    assert 0.0 < chat_scores[0] < 1.0  # the model was not trained on five earlier turns


def test_prompts_have_five_examples_and_short_answers_score_nothing(lm: AntiphonLM, tasks: TaskManager) -> None:
    found = evaluate(lm, tasks, limit=3, gen_kwargs="max_gen_toks=3")
    assert scores_of(found) == [0.0, 0.0]
    prompt = found["samples"]["word_problems"][0]["arguments"][0][0]
    assert prompt.count("Question: ") == 6 and prompt.count("#### ") == 5
    assert prompt.endswith("\nAnswer:")


def test_examples_are_not_tested() -> None:
    documents = load_word_problems(version=1.0)
    examples, test = (set(documents[split]["question"]) for split in ("examples", "test"))
    assert not examples & test
    assert examples | test == {problem.question for problem in word_problems()}


def test_logprobs_of_continuations_are_those_of_transformers(lm: AntiphonLM, reference: Any) -> None:
    solved = "Question: Ben has 3 boxes with 4 apples each. How many apples does Ben have?\nAnswer:"
    (answer,) = lm.generate_until(ask("generate_until", (solved, {"until": ["\n"]})), disable_tqdm=True)
    pairs = [(solved, answer), (solved, " Ben has 13 apples."), ("Once upon ", " a time"), ("", TEXTS[0])]
    found = lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        whole = lm.tok_encode(context + continuation)
        num_context = len(lm.tok_encode(context.rstrip()))
        logprobs, greedy = reference_logprobs(reference, whole)
        assert logprob == pytest.approx(float(logprobs[num_context - 1 :].sum()), abs=2e-3)
        assert is_greedy == bool(greedy[num_context - 1 :].all())
    assert [is_greedy for _, is_greedy in found][:2] == [True, False]


def test_logprobs_of_whole_texts_are_those_of_transformers(lm: AntiphonLM, reference: Any) -> None:
    found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", *[(text,) for text in TEXTS]), disable_tqdm=True)
    for text, logprob in zip(TEXTS, found, strict=True):
        assert logprob == pytest.approx(float(reference_logprobs(reference, lm.tok_encode(text))[0].sum()), abs=2e-3)


def test_a_long_text_is_scored_in_windows(one_rank: LLM, reference: Any) -> None:
    short = AntiphonLM(llm=one_rank, max_length=18)
    token_ids = short.tok_encode(TEXTS[1], add_special_tokens=False)
    assert len(token_ids) > 2 * 16
    (found,) = short.loglikelihood_rolling(ask("loglikelihood_rolling", (TEXTS[1],)), disable_tqdm=True)
    expected = 0.0
    for start in range(0, len(token_ids), 16):  # the last window is as long as the others, but scores only the rest
        end = min(start + 16, len(token_ids))
        before = [short.prefix_token_id, *token_ids][max(0, end - 16) : end]
        logprobs, _ = reference_logprobs(reference, [*before, token_ids[end - 1]])
        expected += float(logprobs[start - end :].sum())
    assert found == pytest.approx(expected, abs=2e-3)


def test_texts_end_before_a_stop_string_and_long_prompts_lose_their_beginning(one_rank: LLM, lm: AntiphonLM) -> None:
    prompt = word_problems()[0].prompt
    whole, cut = lm.generate_until(
        ask(
            "generate_until", (prompt, {"until": ["Question:"]}), (prompt, {"until": ["####", ""], "max_gen_toks": 99})
        ),
        disable_tqdm=True,
    )
    assert word_problems()[0].solved_by(whole)
    assert cut == whole.partition("####")[0]
    num_tokens = len(lm.tok_encode(prompt)) - 1  # <|bos|> has no room
    short = AntiphonLM(llm=one_rank, max_length=num_tokens + 5)
    asked = ask(
        "generate_until", (prompt, {"until": [], "max_gen_toks": 5}), ("many words " * 99 + prompt, {"max_gen_toks": 5})
    )
    assert len(set(short.generate_until(asked, disable_tqdm=True))) == 1


def test_unknown_parameters_and_contradictions_are_refused(lm: AntiphonLM) -> None:
    with raises(OptionError, option="gen_kwargs", value="top_pp", remedy="'top_p'"):
        lm.generate_until(ask("generate_until", ("x", {"top_pp": 0.5})))
    with raises(OptionError, "pretrained='a'", "model='b'", option="model", value="b"):
        AntiphonLM("a", model="b")


def test_the_chat_template_gives_the_prompts_of_llm_chat(one_rank: LLM, lm: AntiphonLM) -> None:
    messages = [{"role": "user", "content": "Tell me a story about a fox named Ruby."}]
    assert lm.tok_encode(lm.apply_chat_template(messages)) == one_rank.chat_prompt(messages)


def test_the_command_adds_the_model_and_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: ran.append(sys.argv[1:]))
    own, other = ["--tasks", "word_problems"], ["--tasks", "x", "--include_path=/tmp"]
    for arguments in (own, other, ["--help"]):
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        command.main()
    assert ran == [[*own, "--include_path", str(command.TASKS)], other, ["--help"]]
    assert get_model("antiphon") is AntiphonLM


def test_an_error_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: AntiphonLM(dbo="onn"))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: dbo='onn' is not known")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dbo", ["off", "on"])
def test_the_command_solves_the_whole_task(dbo: str, tmp_path: Path) -> None:
    arguments = ["--model", "antiphon", "--tasks", "word_problems", "--output_path", str(tmp_path)]
    arguments += ["--model_args", f"ranks=2,dbo={dbo}"]
    words = [sys.executable, "-m", "antiphon.accuracy.lm_eval", *arguments]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["n-samples"]["word_problems"]["effective"] == 224
    scores = found["results"]["word_problems"]
    assert scores["exact_match,strict-match"] == scores["exact_match,flexible-extract"] == 1.0


@pytest.mark.slow
@pytest.mark.processes
def test_the_python_example_of_the_documents_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/accuracy.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    words = [sys.executable, str(tmp_path / "example.py")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"'exact_match,strict-match': \D*64\(1\.0\)|'exact_match,strict-match': 1\.0", ended.stdout)


def test_without_lm_eval_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "pip install 'antiphon[eval]'" in capsys.readouterr().err
