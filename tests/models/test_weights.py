"""Checkpoints: what a rank reads, and the errors for files that do not fit."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from antiphon.comm import RankGroup, create_transport
from antiphon.core.errors import ModelError, OptionError
from antiphon.models import (
    Checkpoint,
    LoadProgress,
    build_model,
    check_checkpoint,
    expert_shape,
    load_weights,
    read_config,
    skeleton,
)
from antiphon.models.config import DOWNLOAD_AGAIN
from antiphon.models.decoder import Decoder
from antiphon.runtime import CpuStreams
from tests.models.twin import change_tensors, random_checkpoint, stored_tensors
from tests.support.errors import raises

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


def error_of(folder: Path) -> ModelError:
    """The same error must come from the check before the start and from loading."""
    with pytest.raises(ModelError) as checked:
        check_checkpoint(Checkpoint(folder), skeleton(read_config(folder)).checkpoint_tensors())
    with pytest.raises(ModelError) as loaded:
        load(folder)
    assert loaded.value.fields() == checked.value.fields()
    return checked.value


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
    told: list[LoadProgress] = []
    load_weights(Checkpoint(folder), model.checkpoint_tensors(), progress=told.append)
    tensors = dict(model.checkpoint_tensors())
    assert [(step.tensors, step.num_tensors) for step in told] == [
        (number, len(tensors)) for number in range(1, len(tensors) + 1)
    ]
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())  # stored as they are loaded, in float32
    assert {step.num_bytes for step in told} == {num_bytes}
    read = [0, *(step.bytes for step in told)]
    assert sorted(after - before for before, after in pairwise(read)) == sorted(t.nbytes for t in tensors.values())
    assert str(LoadProgress(tensors=1, num_tensors=9, bytes=4_970_000_000, num_bytes=14_200_000_000)) == (
        "35% of 14.2 GB"
    )


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
    assert repr(A_WEIGHT) in error_of(folder).fact


def test_a_tensor_that_is_missing_in_the_index(sharded: Path) -> None:
    change_index(sharded, **{A_WEIGHT: None})
    assert repr(A_WEIGHT) in error_of(sharded).fact


def test_an_index_that_names_the_wrong_file(sharded: Path) -> None:
    files = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in files.values() if file != files[A_WEIGHT])
    change_index(sharded, **{A_WEIGHT: other})
    fact = error_of(sharded).fact
    assert repr(A_WEIGHT) in fact and str(other) in fact


def test_an_index_that_names_a_file_that_is_missing(sharded: Path) -> None:
    change_index(sharded, **{A_WEIGHT: "model-00099-of-00099.safetensors"})
    error = error_of(sharded)
    assert "model-00099-of-00099.safetensors" in error.fact and error.limit.startswith("1 of")
    assert error.remedy == DOWNLOAD_AGAIN


def test_shards_that_are_missing_are_counted_before_anything_is_read(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    for path in shards[1:]:
        path.unlink()
    checkpoint = CountingCheckpoint(sharded)
    with raises(ModelError, f"{len(shards) - 1} of {len(shards)}"):
        load_weights(checkpoint, model_of_rank(sharded, 0, 1).checkpoint_tensors())
    assert checkpoint.read == []


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_shard_is_found_before_anything_is_read(sharded: Path, keep: int) -> None:
    path = max(sharded.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:keep])
    checkpoint = CountingCheckpoint(sharded)
    with raises(ModelError, path.name, remedy=DOWNLOAD_AGAIN):
        load_weights(checkpoint, model_of_rank(sharded, 0, 1).checkpoint_tensors())
    assert checkpoint.read == []


@pytest.mark.parametrize("file_name", [3, None, ["a"]])
def test_an_index_whose_values_are_no_names(sharded: Path, file_name: object) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][A_WEIGHT] = file_name
    path.write_text(json.dumps(index))
    assert str(sharded) in error_of(sharded).fact


def test_a_wrong_shape(folder: Path) -> None:
    change_tensors(folder, **{A_WEIGHT: torch.randn(20, 23)})
    error = error_of(folder)
    assert repr(A_WEIGHT) in error.fact and "[20, 23]" in error.fact and "[20, 24]" in error.limit


def test_a_shape_that_would_broadcast(folder: Path) -> None:
    change_tensors(folder, **{A_WEIGHT: torch.randn(1, 24)})
    assert "[1, 24]" in error_of(folder).fact


def test_no_checkpoint_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    fact = error_of(folder).fact
    assert "model.safetensors.index.json" in fact and "model.safetensors " in f"{fact} "


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model-q4.gguf"])
def test_checkpoints_in_other_formats(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    error = error_of(folder)
    assert "model.safetensors.index.json" in error.fact
    assert name in error.remedy


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e5m2])
def test_numbers_that_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, **{A_WEIGHT: torch.zeros(20, 24, dtype=dtype)})
    error = error_of(folder)
    assert repr(A_WEIGHT) in error.fact and re.search(r"\b(I8|U8|I32|BOOL|F8_E5M2)$", error.fact)
    assert "bfloat16" in error.remedy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_every_float_format(folder: Path, dtype: torch.dtype) -> None:
    stored = stored_tensors(folder)[A_WEIGHT].to(dtype)
    change_tensors(folder, **{A_WEIGHT: stored})
    assert torch.equal(dict(load(folder).checkpoint_tensors())[A_WEIGHT], stored.float())


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_without_a_map(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "weight_map" in error_of(sharded).fact


def test_an_index_that_is_not_json(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("not json")
    assert "JSON" in error_of(sharded).fact


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    error = error_of(folder)
    assert str(path) in error.fact
    assert error.remedy == DOWNLOAD_AGAIN


def test_experts_that_do_not_divide_by_the_ranks(folder: Path) -> None:
    with raises(OptionError, "12", "5"):
        model_of_rank(folder, 0, 5)
