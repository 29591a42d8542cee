"""Adding an architecture by the recipe in CONTRIBUTING.md: one file and one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from antiphon import LLM, SamplingParams
from antiphon.core.bundled import BUNDLED_MODEL, bundled_model
from antiphon.core.errors import ModelError
from antiphon.models import read_config
from antiphon.models.architectures import registry
from tests.support.checkpoints import copy_bundled, rewrite_json
from tests.support.errors import raises
from tests.support.prompts import mixed_prompts

NAME = "PigeonholeForCausalLM"
READER = """
from antiphon.kernels.router import Scoring
from antiphon.models.attention.mla import LatentAttentionConfig
from antiphon.models.decoder import DecoderConfig
from antiphon.models.router import RoutingConfig


def read_pigeonhole(file):
    file.require("pigeons", ("homing",), None)
    routing = RoutingConfig(
        scores=Scoring.SIGMOID,
        num_experts=file.count("pigeonholes"),
        top_k=file.count("letters_per_token"),
        num_groups=file.count("n_group"),
        top_groups=file.count("topk_group"),
        normalize=True,
        scale=file.number("routed_scaling_factor", 1.0),
    )
    return DecoderConfig.read(
        file,
        attention=LatentAttentionConfig.read(file, interleaved=True),
        routing=routing,
        num_dense_layers=file.count("first_k_dense_replace"),
        num_shared_experts=file.count("n_shared_experts"),
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled checkpoint with a configuration that only the new architecture's reader understands."""
    copy = copy_bundled(tmp_path)
    bundled = read_config(bundled_model())
    rewrite_json(
        copy / "config.json",
        architectures=[NAME],
        pigeons="homing",
        pigeonholes=bundled.num_experts,
        letters_per_token=bundled.top_k,
        n_routed_experts=None,
        num_experts_per_tok=None,
    )
    return copy


def add_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The two steps of the recipe, in a package outside the project."""
    package = tmp_path / "pigeon_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pigeonhole.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.READERS, NAME, "pigeon_models.pigeonhole:read_pigeonhole")


def test_one_file_and_one_line_give_the_bundled_models_texts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, sampling = mixed_prompts(4), SamplingParams(temperature=0.0, max_tokens=12)
    with LLM(BUNDLED_MODEL, ranks=1, dtype="float32") as llm:
        expected = llm.generate(prompts, sampling)
    add_architecture(monkeypatch, tmp_path)
    with LLM(str(folder), ranks=1, dtype="float32") as llm:
        found = llm.generate(prompts, sampling)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.text for one in found] == [one.text for one in expected]
    assert all(len(one.token_ids) > 1 for one in expected)
    assert read_config(folder).architecture == NAME


def test_its_name_is_offered_once_its_line_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises(ModelError, option="architectures", value=NAME, remedy=", ".join(registry.READERS)):
        read_config(folder)
    add_architecture(monkeypatch, tmp_path)
    misspelled = NAME.replace("Pigeon", "Pidgeon")
    rewrite_json(folder / "config.json", architectures=[misspelled])
    with raises(ModelError, option="architectures", value=misspelled, remedy=f"{NAME!r}?"):
        read_config(folder)


def test_what_its_reader_refuses_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_architecture(monkeypatch, tmp_path)
    rewrite_json(folder / "config.json", pigeons="carrier")
    with raises(ModelError, "homing", option="pigeons", value="carrier"):
        LLM(str(folder), ranks=1)
