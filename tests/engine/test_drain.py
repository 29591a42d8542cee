"""`StepEngine.drain`: it takes the tokens of the step in flight, and the steps after it go on as if there were none."""

from __future__ import annotations

import pytest

from antiphon.comm import RankGroup
from antiphon.config.engine_config import EngineConfig
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.build import build_engine
from antiphon.engine.sampling.new_tokens import NewTokens
from antiphon.engine.scheduling.request import Request
from antiphon.engine.step import StepEngine


def make_engine(*, runs_ahead: bool) -> StepEngine:
    """An engine on the CPU. runs_ahead: as on a device that queues its work, with the tokens left in a buffer."""
    config = EngineConfig(num_layers=2, load_format="dummy", device="cpu", max_model_len=64).resolve()
    engine = build_engine(config, RankGroup(rank=0, size=1))
    if runs_ahead:
        engine.sampler.new_tokens = NewTokens(8, engine.transport.streams)
    return engine


def requests() -> list[Request]:
    params = ResolvedParams(temperature=0.0, ignore_eos=True)
    prompts = [(5, 6, 7), tuple(range(20, 40))]
    return [
        Request(request_id=number, prompt_ids=prompt, params=params, max_tokens=9, seed=0)
        for number, prompt in enumerate(prompts)
    ]


def texts(engine: StepEngine, *, drains_after: int) -> dict[int, list[int]]:
    """The tokens of every request, as they come out. drains_after: steps until a drain; 0 for none."""
    found: dict[int, list[int]] = {0: [], 1: []}
    outputs = engine.step(requests()).outputs
    for number in range(1, 20):
        if number == drains_after:
            assert len(engine.in_flight) == 1
            drained = engine.drain()
            assert [output.request_id for output in drained] == [0, 1]
            assert not engine.in_flight and engine.drain() == []
            outputs += drained
        outputs += engine.step().outputs
    for output in outputs:
        assert output.token is not None
        found[output.request_id].append(output.token.token_id)
    assert not engine.in_flight and not engine.scheduler.requests
    return found


@pytest.mark.parametrize("drains_after", [1, 4, 9])
def test_a_drain_loses_no_token_and_changes_none(drains_after: int) -> None:
    expected = texts(make_engine(runs_ahead=False), drains_after=0)
    assert all(len(tokens) == 9 for tokens in expected.values())
    assert texts(make_engine(runs_ahead=True), drains_after=drains_after) == expected
