"""Dummy weights: shapes without a checkpoint, prompts of token ids, tables in place of routers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM, GeneratedOutput, SamplingParams
from antiphon.config.describe import describe_config
from antiphon.config.engine_config import EngineConfig
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import ModelError, RequestError
from antiphon.models import PRESETS
from tests.support.errors import raises

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 1, 4, 1, 5], [2, 7, 1, 8], [100, 200]]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, return_logits=True)


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A folder with a config.json and nothing else."""
    config = json.loads((bundled_model() / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "vocab_size": 300}
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def generate(shape: str, **options: Any) -> list[GeneratedOutput]:
    with LLM(shape, load_format="dummy", num_layers=3, device="cpu", **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        assert "dummy weights, routing" in dict(describe_config(llm.config))["model"]
        assert "cut to 3 layers" in dict(describe_config(llm.config))["model"]
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert (output.prompt, output.text) == ("", "")
        assert len(output.token_ids) == 6
        assert output.logits is not None and output.logits.isfinite().all()
    return outputs


def ids_of(outputs: list[GeneratedOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.processes
def test_one_rank_and_two_are_the_same_model(shape: str) -> None:
    alone = generate(shape)
    assert len({tuple(ids) for ids in ids_of(alone)}) == len(PROMPTS)
    assert ids_of(generate(shape, ranks=2, dbo="on")) == ids_of(alone)


def test_the_seed_makes_the_weights(shape: str) -> None:
    assert ids_of(generate(shape, seed=1)) != ids_of(generate(shape, seed=2))
    assert ids_of(generate(shape, seed=1)) == ids_of(generate(shape, seed=1))


@pytest.mark.processes
def test_a_table_routes_in_place_of_the_routers(shape: str) -> None:
    """Other experts, other tokens; and the same ones whether a step is split or not."""
    by_model = generate(shape, ranks=2, dbo="off")
    serial = generate(shape, ranks=2, dbo="off", routing="uniform")
    assert ids_of(serial) != ids_of(by_model)
    assert ids_of(generate(shape, ranks=2, dbo="on", routing="uniform")) == ids_of(serial)


def test_texts_are_refused_and_token_ids_still_work(shape: str) -> None:
    with LLM(shape, load_format="dummy", num_layers=2, device="cpu") as llm:
        with raises(RequestError, "tokenizer"):
            llm.generate("Once upon a time")
        with raises(RequestError, "tokenizer"):
            llm.chat_prompt([{"role": "user", "content": "hello"}])
        assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(name: str) -> None:
    config = EngineConfig(model=name, load_format="dummy", ranks=2, device="cpu", routing="zipf:1.2").resolve()
    assert config.options.model == name
    assert config.options == EngineConfig(**_fields(config.options)).resolve().options  # as a worker does
    assert str(config.routing) == "zipf:1.2"
    cut = EngineConfig(model=name, load_format="dummy", num_layers=4, device="cpu").resolve()
    assert cut.model.num_layers == 4 < config.model.num_layers


def _fields(options: EngineConfig) -> dict[str, Any]:
    return {name: getattr(options, name) for name in EngineConfig.__dataclass_fields__}


def test_layers_of_a_real_checkpoint_can_be_left_out() -> None:
    with LLM(num_layers=3, device="cpu") as llm:
        assert len(llm.generate("Once upon a time", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    with raises(ModelError, "num_layers=99"):
        EngineConfig(num_layers=99, device="cpu").resolve()
