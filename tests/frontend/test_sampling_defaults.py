"""Sampling parameters that the caller leaves open: the same offline, on the command line and in the server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM, ModelError, SamplingParams
from antiphon.core.bundled import bundled_model
from antiphon.core.sampling import NEUTRAL_SAMPLING, ResolvedParams
from antiphon.models import read_config
from antiphon.server.protocol import ChatRequest, CompletionRequest
from tests.support.errors import raises

SAYS = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}


def folder_that_says(folder: Path, values: dict[str, Any] | None) -> Path:
    shutil.copytree(bundled_model(), folder, symlinks=True)
    path = folder / "generation_config.json"
    path.unlink()
    if values is not None:
        path.write_text(json.dumps({"eos_token_id": 2, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, {}),
        ({}, {}),
        (SAYS, {name: value for name, value in SAYS.items() if name != "do_sample"}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": None, "top_k": 50}, {"top_k": 50}),
    ],
)
def test_defaults_from_generation_config(
    tmp_path: Path, values: dict[str, Any] | None, expected: dict[str, float]
) -> None:
    folder = folder_that_says(tmp_path / "model", values)
    assert dict(read_config(folder).sampling_defaults) == expected


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("temperature", -1), ("top_p", 2), ("top_k", 1.5)])
def test_wrong_defaults_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    folder = folder_that_says(tmp_path / "model", {name: value})
    with raises(ModelError, "generation_config.json", name):
        LLM(str(folder))


def test_open_parameters_come_from_the_model_or_are_neutral() -> None:
    given = SamplingParams(max_tokens=5, top_p=0.5, seed=3)
    assert given.resolve({}) == ResolvedParams(max_tokens=5, seed=3, **NEUTRAL_SAMPLING | {"top_p": 0.5})
    found = given.resolve({"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.6, 0.5, 20, 0.0)
    assert SamplingParams(temperature=0.0).resolve({"temperature": 0.6}).temperature == 0.0


def test_all_three_ways_leave_the_same_open(tmp_path: Path) -> None:
    """Then `RequestMaker`, which all of them go through, resolves it; here it is seen in the texts."""
    with LLM(str(folder_that_says(tmp_path / "model", SAYS)), seed=4) as llm:
        named = SamplingParams(max_tokens=24, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, seed=4)
        (expected,) = llm.generate("Once upon a time", named)
        (greedy,) = llm.generate("Once upon a time", SamplingParams(max_tokens=24, temperature=0.0))
        assert expected.token_ids != greedy.token_ids
        body = {"model": "m", "max_tokens": 24, "seed": 4}
        asked = [
            SamplingParams(max_tokens=24, seed=4),
            CompletionRequest(**body, prompt="x").sampling_params(),
            ChatRequest(**body, messages=[{"role": "user", "content": "x"}]).sampling_params(),
        ]
        for params in asked:
            (output,) = llm.generate("Once upon a time", params)
            assert output.token_ids == expected.token_ids
