"""Tensors of a checkpoint that no rank reads: harmless, listed, or refused. By names and headers only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from antiphon.core.errors import ModelError
from antiphon.models import Checkpoint, match_checkpoint, read_config
from tests.models.quantize import quantize_checkpoint
from tests.models.test_match import SINGLE, spread, weight_map, write_index
from tests.models.twin import change_tensors, random_checkpoint
from tests.support.errors import raises

LAYER = "model.layers.1."


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", refuse)


def notes_of(folder: Path, num_layers: int | None = None) -> tuple[str, ...]:
    return match_checkpoint(read_config(folder, num_layers=num_layers), folder).notes


def error_of(folder: Path) -> ModelError:
    with raises(ModelError, str(folder)) as raised:
        notes_of(folder)
    assert "\n" not in str(raised.error) and isinstance(raised.error, ModelError)
    return raised.error


def add(folder: Path, *names: str, in_shards: bool = False) -> None:
    change_tensors(folder, **{name: torch.randn(4) for name in names})
    if in_shards:
        spread(folder)


@pytest.mark.parametrize(
    ("kind", "name", "meaning"),
    [
        ("qwen3-moe", f"{LAYER}self_attn.q_proj.bias", "a bias"),
        ("qwen3-moe", f"{LAYER}self_attn.o_proj.bias", "a bias"),
        ("qwen3-moe", f"{LAYER}self_attn.sinks", "an attention sink"),
        ("qwen3-moe", f"{LAYER}post_feedforward_layernorm.weight", "a norm"),
        ("qwen3-moe", f"{LAYER}mlp.gate.e_score_correction_bias", "a correction of the router"),
        ("qwen3-moe", f"{LAYER}mlp.gate.bias", "a bias"),
        ("qwen3-moe", f"{LAYER}mlp.shared_expert.up_proj.weight", "a weight of shared experts"),
        ("qwen3-moe", f"{LAYER}mlp.experts.3.up_proj.bias", "a bias"),
        ("qwen3-moe", f"{LAYER}mlp.experts.12.up_proj.weight", "expert numbered above the 12"),
        ("qwen3-moe", f"{LAYER}mlp.experts.3.up_proj.weight_scale", "quantized"),
        ("qwen3-moe", f"{LAYER}mlp.experts.3.up_proj.input_scale", "quantized"),
        ("qwen3-moe", f"{LAYER}self_attn.k_proj.qweight", "quantized"),
        ("qwen3-moe", f"{LAYER}self_attn.k_proj.g_idx", "quantized"),
        ("qwen3-moe", f"{LAYER}self_attn.k_proj.qzeros", "quantized"),
        ("qwen3-moe", f"{LAYER}self_attn.k_proj.lora_A.weight", "an adapter"),
        ("qwen3-moe", "base_model.model.model.layers.1.self_attn.k_proj.lora_A.default.weight", "an adapter"),
        ("qwen3-moe", f"{LAYER}attn.something.weight", "a weight"),
        ("qwen3-moe", "lm_head.bias", "a bias"),
        ("qwen3-moe", "model.norm.bias", "a bias"),
        ("qwen3-moe", "model.embed_tokens.norm.weight", "a norm"),
        ("deepseek-v3", f"{LAYER}self_attn.q_a_proj.bias", "a bias"),
        ("deepseek-v3", f"{LAYER}self_attn.indexer.wk.weight", "a weight"),
        ("deepseek-v3", "model.layers.0.mlp.gate.weight", "a weight"),
        ("deepseek-v3", "model.layers.0.mlp.up_proj.bias", "a bias"),
        ("deepseek-v2", f"{LAYER}mlp.gate.e_score_correction_bias", "a correction of the router"),
        ("glm4-moe", f"{LAYER}self_attn.q_norm.weight", "a norm"),
        ("glm4-moe", f"{LAYER}self_attn.o_proj.bias", "a bias"),
        ("mixtral", f"{LAYER}self_attn.q_norm.weight", "a norm"),
        ("mixtral", f"{LAYER}self_attn.q_proj.bias", "a bias"),
        ("mixtral", f"{LAYER}block_sparse_moe.experts.12.w1.weight", "expert numbered above the 12"),
    ],
)
@pytest.mark.parametrize("in_shards", [False, True])
def test_what_would_change_results_is_refused(
    tmp_path: Path, kind: str, name: str, meaning: str, in_shards: bool
) -> None:
    random_checkpoint(tmp_path, kind=kind)
    assert notes_of(tmp_path) == ()
    add(tmp_path, name, in_shards=in_shards)
    error = error_of(tmp_path)
    assert repr(name) in error.fact and meaning in error.fact
    assert error.limit and error.remedy


def test_the_first_of_many_is_named(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    add(tmp_path, f"{LAYER}b.bias", f"{LAYER}a.bias", "lm_head.bias", "visual.weight")
    fact = error_of(tmp_path).fact
    assert "'lm_head.bias'" in fact and "2 more" in fact


def test_what_is_missing_comes_first(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    change_tensors(tmp_path, **{f"{LAYER}a.bias": torch.randn(3), f"{LAYER}input_layernorm.weight": None})
    assert f"'{LAYER}input_layernorm.weight'" in error_of(tmp_path).fact


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        [f"{LAYER}self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", f"{LAYER}rotary_emb.cos_cached"],
        [f"{LAYER}self_attn.k_scale", f"{LAYER}self_attn.v_scale", f"{LAYER}self_attn.k_proj.k_scale"],
        [  # of DeepSeek-V3 and GLM-4.5, whose index is behind that of the last layer
            "model.layers.3.eh_proj.weight",
            "model.layers.3.enorm.weight",
            "model.layers.3.shared_head.head.weight",
            "model.layers.3.embed_tokens.weight",
            "model.layers.3.self_attn.q_a_proj.weight",
            "model.layers.3.mlp.experts.11.up_proj.weight",
            "model.layers.4.eh_proj.weight",
        ],
    ],
)
def test_what_is_harmless_is_passed_over(tmp_path: Path, names: list[str], in_shards: bool) -> None:
    random_checkpoint(tmp_path)
    add(tmp_path, *names, in_shards=in_shards)
    assert notes_of(tmp_path) == ()


def test_layers_that_were_cut_off_are_harmless(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    assert notes_of(tmp_path, num_layers=2) == ()


def test_weights_without_numbers_are_harmless(tmp_path: Path) -> None:
    """So transformers writes shared experts where there are none."""
    random_checkpoint(tmp_path, n_shared_experts=0)
    assert any("shared_experts" in name for name in load_file(tmp_path / SINGLE))
    assert notes_of(tmp_path) == ()


def test_scales_of_weights_that_are_read_are_not_unread(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    random_checkpoint(source)
    quantize_checkpoint(source, target, plain=tmp_path / "plain")
    assert notes_of(target) == ()


@pytest.mark.parametrize("in_shards", [False, True])
def test_others_are_listed_in_one_sentence(tmp_path: Path, in_shards: bool) -> None:
    random_checkpoint(tmp_path)
    blocks = [f"visual.blocks.{number}.attn.weight" for number in range(20)]
    layers = [f"model.layers.{number}.input_layernorm.weight" for number in (5, 6)]  # more than the config has
    add(tmp_path, *blocks, *layers, "score.weight", in_shards=in_shards)
    (note,) = notes_of(tmp_path)
    assert note == (
        f"{tmp_path}: 23 tensors of the checkpoint are not read: visual.blocks.*.attn.weight (20), "
        "model.layers.*.input_layernorm.weight (2), score.weight"
    )


def test_a_long_list_is_cut_short(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    add(tmp_path, *(f"part_{letter}.weight" for letter in "abcdefgh"))
    (note,) = notes_of(tmp_path)
    assert note.endswith(
        "8 tensors of the checkpoint are not read: part_a.weight, part_b.weight, part_c.weight, part_d.weight, ..."
    )


@pytest.mark.parametrize(("name", "tied"), [(f"{LAYER}self_attn.o_proj.bias", False), ("lm_head.weight", True)])
def test_what_a_shard_holds_without_the_index(tmp_path: Path, name: str, tied: bool) -> None:
    random_checkpoint(tmp_path, tie_word_embeddings=tied)
    change_tensors(tmp_path, **{name: torch.randn(61, 24)})
    spread(tmp_path)
    write_index(tmp_path, {listed: file for listed, file in weight_map(tmp_path).items() if listed != name})
    assert repr(name) in error_of(tmp_path).fact


def test_an_index_that_lists_what_no_file_holds(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    spread(tmp_path)
    write_index(tmp_path, weight_map(tmp_path) | {"score.weight": "model-00001-of-00002.safetensors"})
    (note,) = notes_of(tmp_path)
    assert note.endswith("1 tensor of the checkpoint is not read: score.weight")
    write_index(tmp_path, weight_map(tmp_path) | {f"{LAYER}a.bias": "model-00001-of-00002.safetensors"})
    assert f"no tensor '{LAYER}a.bias'" in error_of(tmp_path).fact


def test_shards_that_nobody_needs_may_be_missing(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    spread(tmp_path)
    write_index(tmp_path, weight_map(tmp_path) | {"model.layers.3.eh_proj.weight": "mtp.safetensors"})
    assert notes_of(tmp_path) == ()


def test_a_hundred_thousand_names(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    spread(tmp_path)
    save_file({"model.layers.3.eh_proj.weight": torch.zeros(1)}, tmp_path / "mtp.safetensors")
    extra = {f"model.layers.3.mlp.experts.{number}.up_proj.weight": "mtp.safetensors" for number in range(100_000)}
    write_index(tmp_path, weight_map(tmp_path) | extra | {"model.layers.3.eh_proj.weight": "mtp.safetensors"})
    assert notes_of(tmp_path) == ()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {f"visual.{number}.weight": "mtp.safetensors" for number in range(100_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (note,) = notes_of(tmp_path)
    assert note.endswith("100000 tensors of the checkpoint are not read: visual.*.weight (100000)")
