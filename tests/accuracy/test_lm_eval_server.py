"""lm_eval with a server gets the same results as with `LLM`, with overlap off and on."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'antiphon[eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from antiphon import LLM
from antiphon.accuracy.lm_eval import TASKS
from antiphon.accuracy.lm_eval_model import AntiphonLM
from antiphon.core.bundled import bundled_model
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(600)]

SCORES = ("exact_match,strict-match", "exact_match,flexible-extract")


def evaluate(lm: Any, *, chat: bool, limit: int = 32) -> tuple[list[float], list[Any]]:
    """The scores and the texts."""
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=["word_problems"],
        task_manager=tasks,
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    scores = found["results"]["word_problems"]
    return [scores[name] for name in SCORES], [sample["resps"] for sample in found["samples"]["word_problems"]]


@pytest.mark.parametrize("dbo", ["off", "on"])
def test_scores_of_the_server_are_those_of_llm(dbo: str, one_rank: LLM) -> None:
    offline = AntiphonLM(llm=one_rank)
    plain, chat = evaluate(offline, chat=False), evaluate(offline, chat=True)
    context, continuations = "Once upon a time", [" there was a fox named Ruby", " there was a", " apples"]
    asked = [Instance("loglikelihood", {}, (context, text), place) for place, text in enumerate(continuations)]
    likely = offline.loglikelihood(asked, disable_tqdm=True)
    with ServerProcess("--ranks", "2", "--dbo", dbo) as server:
        common = {"model": "tiny-deepseek", "num_concurrent": 8, "max_retries": 1}
        completions = get_model("local-completions")(
            base_url=f"{server.url}/v1/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(bundled_model()),
            add_bos_token=True,
            **common,
        )
        chats = get_model("local-chat-completions")(base_url=f"{server.url}/v1/chat/completions", **common)
        assert evaluate(completions, chat=False) == plain
        assert evaluate(chats, chat=True) == chat
        served = completions.loglikelihood(asked, disable_tqdm=True)
    assert plain[0] == [1.0, 1.0]
    assert 0.5 < chat[0][0] < 1.0  # the model was not trained on five earlier turns
    for (logprob, is_greedy), (expected, expected_greedy) in zip(served, likely, strict=True):
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert is_greedy == expected_greedy
