"""Presets: each reads, and is as large as what was published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from antiphon.core.errors import ModelError
from antiphon.models import PRESETS, ModelConfig, num_parameters, preset_file, read_config, skeleton, weight_bytes
from antiphon.models.decoder import Decoder, DecoderConfig
from tests.models.twin import KINDS, random_checkpoint, tiny_config
from tests.support.errors import raises

PUBLISHED = {  # parameters, layers, of them dense, experts, experts a token, numbers in the cache a token and layer
    "deepseek-v2-lite": (15.7e9, 27, 1, 64, 6, 576),
    "deepseek-v3": (671e9, 61, 3, 256, 8, 576),
    "glm-4.5-air": (106e9, 46, 1, 128, 8, 2048),
    "mixtral-8x7b": (46.7e9, 32, 0, 8, 2, 2048),
    "qwen3-235b-a22b": (235e9, 94, 0, 128, 8, 1024),
    "qwen3-30b-a3b": (30.5e9, 48, 0, 128, 8, 1024),
}


def test_the_table_names_all_presets() -> None:
    assert set(PRESETS) == set(PUBLISHED)
    assert {file.stem for file in preset_file(PRESETS[0]).parent.iterdir()} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes(name: str) -> None:
    parameters, *sizes = PUBLISHED[name]
    config = read_config(name)
    assert isinstance(config, DecoderConfig)
    assert num_parameters(config) == pytest.approx(parameters, rel=0.01)
    found = [config.num_layers, config.num_dense_layers, config.num_experts, config.top_k, config.kv_width]
    assert found == sizes


@pytest.mark.parametrize("name", PRESETS)
def test_depth_is_cut(name: str) -> None:
    whole = read_config(name)
    assert isinstance(whole, DecoderConfig)
    least = whole.num_dense_layers + 1
    cut = read_config(name, num_layers=least)
    layers = list(skeleton(cut).decoder_layers())
    assert len(layers) == cut.num_layers == least
    assert read_config(name, num_layers=whole.num_layers) == whole
    for number in (least - 1, whole.num_layers + 1):
        with raises(ModelError, name, option="num_layers", value=number, remedy=f"{least} to {whole.num_layers}"):
            read_config(name, num_layers=number)


def test_a_checkpoint_is_cut_too(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    assert len(skeleton(read_config(tmp_path, num_layers=2)).layers) == 2


def test_a_folder_wins_over_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_config().save_pretrained(tmp_path / PRESETS[0])
    assert read_config(PRESETS[0]).num_layers == 3


def test_an_unknown_name_is_told_the_presets() -> None:
    with raises(ModelError, option="model", value="qwen3", remedy="qwen3-30b-a3b"):
        read_config("qwen3")


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_a_rank(kind: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, kind=kind)
    config = read_config(tmp_path)
    tensors = dict(skeleton(config, torch.bfloat16).checkpoint_tensors())
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    others = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." not in name)
    assert experts > others > 0
    for num_ranks in (1, 2, 4):
        assert weight_bytes(config, torch.bfloat16, num_ranks) == others + experts // num_ranks


@pytest.mark.parametrize("name", PRESETS)
def test_memory_of_a_rank_at_any_depth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of all layers, of which it makes only those that differ, and one more."""
    whole = read_config(name)
    assert isinstance(whole, DecoderConfig)
    least = max(whole.num_dense_layers, 1)  # without any experts, where that can be
    for num_layers in (least, least + 1, least + 2, whole.num_layers):
        config = replace(whole, num_layers=num_layers)
        every = skeleton(config, torch.bfloat16)
        everything = sum(tensor.nbytes for _, tensor in every.checkpoint_tensors())
        assert weight_bytes(config, torch.bfloat16, 1) == everything
    made: list[int] = []

    def counted(config: ModelConfig, dtype: torch.dtype) -> Decoder:
        made.append(config.num_layers)
        return skeleton(config, dtype)

    monkeypatch.setattr("antiphon.models.build.skeleton", counted)
    weight_bytes(whole, torch.bfloat16, 1)
    assert made == [whole.num_dense_layers + 1, whole.num_dense_layers + 2]


def test_presets_are_plain_configs() -> None:
    for name in PRESETS:
        assert "quantization_config" not in json.loads(preset_file(name).read_text())
