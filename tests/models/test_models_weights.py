"""Checkpoints: what a rank reads, and the errors for files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from antiphon.comm import RankGroup, create_transport
from antiphon.core.errors import ModelError
from antiphon.models import (
    Checkpoint,
    build_model,
    check_checkpoint,
    expert_shape,
    load_weights,
    read_config,
    skeleton,
)
from antiphon.models.decoder import Decoder
from antiphon.runtime import CpuStreams
from tests.models.twin import random_checkpoint

NUM_RANKS = 4
NUM_EXPERTS = 12
MOE_LAYERS = (1, 2)

A_WEIGHT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_checkpoint(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    random_checkpoint(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


class CountingCheckpoint(Checkpoint):
    """Notes which tensors are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: list[str] = []

    def tensor(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return super().tensor(name)


def model_of_rank(folder: Path, rank: int, size: int, dtype: torch.dtype = torch.float32) -> Decoder:
    config = read_config(folder)
    group = RankGroup(rank=rank, size=size, process_group=object())  # type: ignore[arg-type]
    transport = create_transport("auto", expert_shape(config, dtype), group=group, streams=CpuStreams(), num_lanes=1)
    return build_model(config, transport)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Write the single file again with some tensors replaced or (`None`) left out."""
    tensors = stored_tensors(folder) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def change_index(folder: Path, **changes: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weight_map = index["weight_map"] | changes
    index["weight_map"] = {name: file for name, file in weight_map.items() if file is not None}
    path.write_text(json.dumps(index))


def write_expert_by_expert(folder: Path) -> None:
    """Replace the single file by one file an expert and one for the rest."""
    tensors = stored_tensors(folder)
    weight_map = {
        name: f"expert-{name.split('.experts.')[1].split('.')[0]}.safetensors"
        if ".experts." in name
        else "rest.safetensors"
        for name in tensors
    }
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load(folder: Path) -> Decoder:
    model = model_of_rank(folder, 0, 1)
    load_weights(Checkpoint(folder), model.checkpoint_tensors())
    return model


def error_of(folder: Path) -> str:
    """The same error must come from the check before the start and from loading."""
    with pytest.raises(ModelError) as checked:
        check_checkpoint(Checkpoint(folder), skeleton(read_config(folder)).checkpoint_tensors())
    with pytest.raises(ModelError) as loaded:
        load(folder)
    assert str(loaded.value) == str(checked.value)
    return str(checked.value)


# ---- what is read


def test_every_weight_arrives(folder: Path) -> None:
    stored = stored_tensors(folder)
    targets = dict(load(folder).checkpoint_tensors())
    assert targets.keys() == stored.keys()
    assert all(torch.equal(targets[name], tensor) for name, tensor in stored.items())


def test_shards_and_one_file_hold_the_same(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    single = tmp_path_factory.mktemp("single")
    random_checkpoint(single)
    first, second = (dict(load(place).checkpoint_tensors()) for place in (sharded, single))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_rank_reads_only_its_own_experts(folder: Path) -> None:
    stored = stored_tensors(folder)
    num_local = NUM_EXPERTS // NUM_RANKS
    readers: dict[str, list[int]] = {name: [] for name in stored}
    for rank in range(NUM_RANKS):
        model, checkpoint = model_of_rank(folder, rank, NUM_RANKS), CountingCheckpoint(folder)
        load_weights(checkpoint, model.checkpoint_tensors())
        assert len(checkpoint.read) == len(set(checkpoint.read)), "a tensor was read twice"
        for name in checkpoint.read:
            readers[name].append(rank)
        targets = dict(model.checkpoint_tensors())
        assert targets.keys() == set(checkpoint.read)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in targets.items())
    for name, ranks in readers.items():
        if ".experts." in name:
            assert ranks == [int(name.split(".experts.")[1].split(".")[0]) // num_local], name
        else:
            assert ranks == list(range(NUM_RANKS)), name
    expected = len(MOE_LAYERS) * NUM_EXPERTS * 3
    assert sum(".experts." in name for name in readers) == expected


def test_files_of_others_are_not_opened(folder: Path) -> None:
    write_expert_by_expert(folder)
    for number in range(NUM_EXPERTS // NUM_RANKS, NUM_EXPERTS):
        (folder / f"expert-{number}.safetensors").unlink()
    load_weights(Checkpoint(folder), model_of_rank(folder, 0, NUM_RANKS).checkpoint_tensors())


def test_the_dtype_is_converted(folder: Path) -> None:
    model = model_of_rank(folder, 0, 1, torch.bfloat16)
    load_weights(Checkpoint(folder), model.checkpoint_tensors())
    stored = stored_tensors(folder)
    for name, tensor in model.checkpoint_tensors():
        expected = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert tensor.dtype == expected, name
        assert torch.equal(tensor, stored[name].to(expected))


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in stored_tensors(tmp_path)
    model = load(tmp_path)
    hidden_ND = torch.randn(3, 24)
    assert torch.equal(model.logits(hidden_ND), hidden_ND @ model.embed_tokens.weight.t())


def test_progress_is_told(folder: Path) -> None:
    model = model_of_rank(folder, 0, 1)
    told: list[tuple[int, int]] = []
    load_weights(Checkpoint(folder), model.checkpoint_tensors(), progress=lambda done, of: told.append((done, of)))
    total = len(dict(model.checkpoint_tensors()))
    assert told == [(number, total) for number in range(1, total + 1)]


def test_tensors_beyond_the_model_are_passed_over(folder: Path) -> None:
    """Such as the layers for multi-token prediction."""
    change_tensors(folder, **{"model.layers.61.eh_proj.weight": torch.randn(2, 2)})
    load(folder)


def test_the_skeleton_has_no_memory(folder: Path) -> None:
    tensors = [tensor for _, tensor in skeleton(read_config(folder)).checkpoint_tensors()]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)


# ---- what does not fit


def test_a_tensor_that_is_missing_in_the_file(folder: Path) -> None:
    change_tensors(folder, **{A_WEIGHT: None})
    assert f"has no tensor {A_WEIGHT!r}; download it again" in error_of(folder)


def test_a_tensor_that_is_missing_in_the_index(sharded: Path) -> None:
    change_index(sharded, **{A_WEIGHT: None})
    assert f"has no tensor {A_WEIGHT!r}; download it again" in error_of(sharded)


def test_an_index_that_names_the_wrong_file(sharded: Path) -> None:
    files = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in files.values() if file != files[A_WEIGHT])
    change_index(sharded, **{A_WEIGHT: other})
    message = error_of(sharded)
    assert f"has no tensor {A_WEIGHT!r}, though its index places it in {other}" in message


def test_an_index_that_names_a_file_that_is_missing(sharded: Path) -> None:
    change_index(sharded, **{A_WEIGHT: "model-00099-of-00099.safetensors"})
    assert "model-00099-of-00099.safetensors cannot be opened" in error_of(sharded)


@pytest.mark.parametrize("file_name", [3, None, ["a"]])
def test_an_index_whose_values_are_no_names(sharded: Path, file_name: object) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][A_WEIGHT] = file_name
    path.write_text(json.dumps(index))
    assert str(sharded) in error_of(sharded)


def test_a_wrong_shape(folder: Path) -> None:
    change_tensors(folder, **{A_WEIGHT: torch.randn(20, 23)})
    assert f"has {A_WEIGHT!r} with shape [20, 23]; its config.json needs [20, 24]" in error_of(folder)


def test_a_shape_that_would_broadcast(folder: Path) -> None:
    change_tensors(folder, **{A_WEIGHT: torch.randn(1, 24)})
    assert "with shape [1, 24]" in error_of(folder)


def test_no_checkpoint_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors.index.json nor model.safetensors" in error_of(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_without_a_map(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "has no weight_map of file names; download it again" in error_of(sharded)


def test_an_index_that_is_not_json(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("not json")
    assert "cannot be read as JSON" in error_of(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = error_of(folder)
    assert str(path) in message
    assert "download it again" in message


def test_experts_that_do_not_divide_by_the_ranks(folder: Path) -> None:
    with pytest.raises(ValueError, match="num_experts=12 is not divisible by ranks=5"):
        model_of_rank(folder, 0, 5)
