"""Block-wise float8 checkpoints: the same numbers as the weights they stand for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from antiphon import LLM, SamplingParams
from antiphon.accuracy.evaluate import word_problems
from antiphon.comm import RankGroup, create_transport
from antiphon.core.batch import RequestSlice
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import ModelError
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
from antiphon.models.checkpoint.block_fp8 import BlockFp8
from antiphon.models.decoder import Decoder
from antiphon.runtime import CpuStreams
from tests.models.quantize import QUANTIZATION, quantize_checkpoint, quantized
from tests.models.twin import Twin, random_checkpoint, random_ids, rewrite_config, scattered_blocks
from tests.support.errors import raises

A_WEIGHT = "model.layers.1.mlp.experts.5.up_proj.weight"
A_SCALE = A_WEIGHT + "_scale_inv"


def load(folder: Path, *, dtype: torch.dtype = torch.float32, rank: int = 0, size: int = 1) -> Decoder:
    config = read_config(folder)
    group = RankGroup(rank=rank, size=size, process_group=object())  # type: ignore[arg-type]
    transport = create_transport("auto", expert_shape(config, dtype), group=group, streams=CpuStreams(), num_lanes=1)
    model = build_model(config, transport)
    load_weights(Checkpoint(folder), model.checkpoint_tensors())
    return model


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny checkpoint in blocks of 8 x 16, with blocks at the edges that are smaller, and its plain twin."""
    random_checkpoint(tmp_path / "source")
    num_quantized = quantize_checkpoint(
        tmp_path / "source", tmp_path / "quantized", plain=tmp_path / "plain", block=(8, 16)
    )
    assert num_quantized == 3 * 5 + 3 + 2 * (3 + 12 * 3)  # attention, dense layer, experts
    return tmp_path / "quantized", tmp_path / "plain"


def change_tensors(folder: Path, file: str, **changes: torch.Tensor | None) -> None:
    """Rewrite a file, and the index, with tensors replaced or (`None`) left out."""
    tensors = {name: t for name, t in (load_file(folder / file) | changes).items() if t is not None}
    save_file(tensors, folder / file)
    path = folder / "model.safetensors.index.json"
    others = {name: where for name, where in json.loads(path.read_text())["weight_map"].items() if where != file}
    path.write_text(json.dumps({"weight_map": others | dict.fromkeys(tensors, file)}))


def error_of(folder: Path) -> ModelError:
    """The same error must come from the check before the start and from loading."""
    with pytest.raises(ModelError) as checked:
        check_checkpoint(Checkpoint(folder), skeleton(read_config(folder)).checkpoint_tensors())
    with pytest.raises(ModelError) as loaded:
        load(folder)
    assert loaded.value.fields() == checked.value.fields()
    return checked.value


# ---- the same numbers


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 20), (5, 700)], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (3, 7)], ids=str)
def test_every_number_gets_the_scale_of_its_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    stored_OI, scale_BC, plain_OI = quantized(torch.randn(shape), *block)
    assert scale_BC.shape == BlockFp8(rows=block[0], columns=block[1]).scale_shape(*shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out_OI = torch.full(shape, float("nan"), dtype=dtype)
        BlockFp8(rows=block[0], columns=block[1]).dequantize(stored_OI, scale_BC, out_OI)
        assert torch.equal(out_OI, plain_OI.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_those_of_the_plain_checkpoint(pair: tuple[Path, Path], dtype: torch.dtype) -> None:
    ours, plain = (dict(load(folder, dtype=dtype).checkpoint_tensors()) for folder in pair)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_a_rank_gets_its_own_experts(pair: tuple[Path, Path]) -> None:
    for rank in range(4):
        ours, plain = (dict(load(folder, rank=rank, size=4).checkpoint_tensors()) for folder in pair)
        assert sum(".experts." in name for name in ours) == 2 * 3 * 3
        assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_scales_of_a_narrow_dtype(pair: tuple[Path, Path]) -> None:
    folder = pair[0]
    scale = load_file(folder / "scales.safetensors")[A_SCALE].bfloat16()
    change_tensors(folder, "scales.safetensors", **{A_SCALE: scale})
    change_tensors(folder, "weights.safetensors", **{A_WEIGHT: torch.ones(20, 24).to(torch.float8_e4m3fn)})
    loaded = dict(load(folder).checkpoint_tensors())[A_WEIGHT]
    assert torch.equal(loaded, torch.kron(scale.float(), torch.ones(8, 16))[:20, :24])


def test_bytes_of_weights_and_scales_are_counted(pair: tuple[Path, Path]) -> None:
    folder, told = pair[0], list[LoadProgress]()
    load_weights(Checkpoint(folder), load(folder).checkpoint_tensors(), progress=told.append)
    stored = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    assert told[-1].bytes == told[-1].num_bytes == sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize("kind", ["deepseek-v3", "deepseek-v2", "qwen3-moe", "glm4-moe"])
def test_logits_are_those_of_the_plain_checkpoint(kind: str, tmp_path: Path) -> None:
    theirs = random_checkpoint(tmp_path / "source", kind=kind)
    quantize_checkpoint(tmp_path / "source", tmp_path / "quantized", plain=tmp_path / "plain", block=(16, 8))
    ids = random_ids(20, seed=4)
    (blocks,) = scattered_blocks(1, 20)
    request = RequestSlice(request_id=0, token_ids=tuple(ids), context_len=0, block_ids=blocks)
    ours, plain = (Twin.load(theirs, tmp_path / name).our_logits([request], (7,)) for name in ("quantized", "plain"))
    assert ours.isfinite().all()
    assert torch.equal(ours, plain)


@pytest.fixture(scope="module")
def bundled_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundled model in blocks of 128 x 128, which some of its sizes do not fill."""
    folder = tmp_path_factory.mktemp("bundled")
    quantize_checkpoint(bundled_model(), folder / "quantized", plain=folder / "plain")
    return folder / "quantized", folder / "plain"


def test_the_bundled_model_still_solves_word_problems(bundled_pair: tuple[Path, Path]) -> None:
    problems = word_problems()[:24]
    texts = []
    for folder in bundled_pair:
        with LLM(str(folder), device="cpu") as llm:
            outputs = llm.generate([problem.prompt for problem in problems], SamplingParams(max_tokens=64))
        texts.append([output.text for output in outputs])
    assert texts[0] == texts[1]
    assert all(problem.solved_by(text) for problem, text in zip(problems, texts[0], strict=True))


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "option", "value"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method", "awq"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method", "gptq"),
        ({"quant_method": "compressed-tensors"}, "quant_method", "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method", "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "quant_method", "mxfp4"),
        ({"quant_method": "modelopt"}, "quant_method", "modelopt"),
        ({"quant_method": "fbgemm_fp8", "weight_block_size": [128, 128]}, "quant_method", "fbgemm_fp8"),
        ({"load_in_8bit": True}, "quant_method", "unknown"),
        ({"quant_method": "fp8"}, "quant_method", "fp8"),
        ({"quant_method": "fp8", "weight_block_size": None}, "quant_method", "fp8"),
        (QUANTIZATION | {"fmt": "e5m2"}, "fmt", "e5m2"),
        (QUANTIZATION | {"activation_scheme": "static"}, "activation_scheme", "static"),
        (QUANTIZATION | {"weight_block_size": 128}, "weight_block_size", 128),
        (QUANTIZATION | {"weight_block_size": [128]}, "weight_block_size", [128]),
        (QUANTIZATION | {"weight_block_size": [128, 0]}, "weight_block_size", [128, 0]),
        (QUANTIZATION | {"weight_block_size": [128, "1"]}, "weight_block_size", [128, "1"]),
        ("fp8", "quantization_config", "fp8"),
    ],
)
def test_other_ways_to_quantize(pair: tuple[Path, Path], settings: Any, option: str, value: Any) -> None:
    rewrite_config(pair[0], quantization_config=settings)
    with raises(ModelError, option=option, value=value):
        read_config(pair[0])
    with raises(ModelError, option=option, value=value):
        Checkpoint(pair[0])


@pytest.mark.parametrize("settings", [QUANTIZATION | {"scale_fmt": "ue8m0"}, QUANTIZATION | {"fmt": "e4m3"}])
def test_what_published_checkpoints_say(pair: tuple[Path, Path], settings: dict[str, Any]) -> None:
    rewrite_config(pair[0], quantization_config=settings)
    read_config(pair[0])
    rewrite_config(pair[0], quantization_config={"quant_method": "fp8", "weight_block_size": [8, 16]})
    load(pair[0])


def test_a_weight_without_its_scale(pair: tuple[Path, Path]) -> None:
    change_tensors(pair[0], "scales.safetensors", **{A_SCALE: None})
    fact = error_of(pair[0]).fact
    assert repr(A_WEIGHT) in fact and repr(A_SCALE) in fact


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (3,), (), (3, 2, 1), (1, 1), (20, 24)], ids=str)
def test_scales_of_a_wrong_shape(pair: tuple[Path, Path], shape: tuple[int, ...]) -> None:
    change_tensors(pair[0], "scales.safetensors", **{A_SCALE: torch.ones(shape)})
    error = error_of(pair[0])
    assert repr(A_SCALE) in error.fact and str(list(shape)) in error.fact
    assert "8 x 16" in error.limit and "[3, 2]" in error.limit


def test_scales_that_are_no_numbers(pair: tuple[Path, Path]) -> None:
    change_tensors(pair[0], "scales.safetensors", **{A_SCALE: torch.ones(3, 2, dtype=torch.uint8)})
    error = error_of(pair[0])
    assert error.fact.endswith("U8") and "[3, 2]" in error.limit


def test_a_scale_beside_a_plain_weight(pair: tuple[Path, Path]) -> None:
    change_tensors(pair[0], "weights.safetensors", **{A_WEIGHT: torch.randn(20, 24)})
    error = error_of(pair[0])
    assert all(name in error.fact for name in (repr(A_SCALE), "[20, 24]", "F32")) and "F8_E4M3" in error.limit


def test_a_scale_beside_a_vector(pair: tuple[Path, Path]) -> None:
    change_tensors(pair[0], "scales.safetensors", **{"model.norm.weight_scale_inv": torch.ones(3)})
    fact = error_of(pair[0]).fact
    assert all(name in fact for name in ("'model.norm.weight_scale_inv'", "[24]", "F32"))


def test_a_config_that_does_not_say_that_weights_are_quantized(pair: tuple[Path, Path]) -> None:
    rewrite_config(pair[0], remove=["quantization_config"])
    error = error_of(pair[0])
    assert "quantization_config" in error.fact and "config.json" in error.remedy


def test_a_quantized_config_over_plain_weights(pair: tuple[Path, Path]) -> None:
    """What has no scale is plain: some matrices always are."""
    rewrite_config(pair[1], quantization_config=QUANTIZATION)
    load(pair[1])
