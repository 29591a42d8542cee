"""`dbo="auto"` on running engines: what the ranks do, and that the start-up block and the statistics say the same."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from antiphon.config.describe import describe_config
from tests.support.prompts import mixed_prompts

pytestmark = pytest.mark.processes

FAST_LINK = "simulated:alltoall:10GB/s:1us"
ON_CPUS = "between processes on CPUs communication is too small a part of a step to be worth hiding"
EIGHT = SamplingParams(max_tokens=8, ignore_eos=True)


def plans_of(llm: LLM, num_prompts: int) -> dict[str, int]:
    """Steps by plan for this many prompts of about 18 tokens each, half of them on each rank."""
    before = llm.stats()["steps_by_plan"]
    llm.generate(mixed_prompts(num_prompts), EIGHT)
    return {plan: count - before[plan] for plan, count in llm.stats()["steps_by_plan"].items()}


def test_on_cpus_auto_is_off_and_thresholds_of_the_user_hold(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(ranks=2, dbo_decode_token_threshold=4, prefix_caching=False) as llm:
        stats = llm.stats()
        assert (stats["dbo"], stats["dbo_reason"]) == (
            "auto",
            f"from 4 tokens per rank in decode, never in prefill: decode as asked, and {ON_CPUS}",
        )
        assert plans_of(llm, 16) == {"serial": 1, "dual": 7}  # the prompts, and then only decode
        assert llm.stats()["serial_reasons"] == {"prefill is not split": 1}
        llm.reconfigure(dbo="on")
        assert llm.stats()["dbo_reason"] == "as asked"
        llm.reconfigure(dbo="auto")
        assert llm.stats()["dbo"] == "auto"
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING), LLM(ranks=2, dbo_start_layer=1, prefix_caching=False) as llm:
        assert dict(describe_config(llm.config))["dbo"] == f"auto: off, {ON_CPUS}"
        assert (llm.stats()["dbo"], llm.stats()["dbo_reason"]) == ("off", f"off: {ON_CPUS}")
        assert plans_of(llm, 80) == {"serial": 8, "dual": 0}
    assert caplog.messages == ["dbo_start_layer=1 has no effect with dbo='auto', which is off here: no step is split"]


def test_over_a_simulated_link_auto_splits_from_its_thresholds() -> None:
    with LLM(ranks=2, transport=FAST_LINK, prefix_caching=False) as llm:
        reason = "from 512 tokens per rank in prefill and 32 in decode: the link is simulated"
        assert llm.stats()["dbo_reason"] == reason
        assert dict(describe_config(llm.config))["dbo"] == f"auto: 2 micro-batches, cut by token, {reason}"
        assert plans_of(llm, 16) == {"serial": 8, "dual": 0}
        assert plans_of(llm, 80) == {"serial": 0, "dual": 8}


def test_one_rank_says_that_it_has_nothing_to_hide(one_rank: LLM) -> None:
    one_rank.reconfigure(dbo="auto")
    stats: dict[str, Any] = one_rank.stats()
    assert (stats["dbo"], stats["dbo_reason"]) == ("off", "off: one rank has no communication to hide")
