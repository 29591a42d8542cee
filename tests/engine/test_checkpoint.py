"""Checkpoints with flaws: the engine warns once, and every rank reads the same files."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from antiphon import LLM, SamplingParams
from antiphon.config.engine_config import EngineConfig
from antiphon.core.bundled import bundled_model
from antiphon.frontend.async_engine import AsyncEngine

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled_model(), tmp_path / "model"))


def tokens_of(folder: Path, ranks: int) -> list[int]:
    with LLM(str(folder), ranks=ranks, device="cpu", max_model_len=64) as llm:
        (output,) = llm.generate("Once upon a time", SamplingParams(max_tokens=8, ignore_eos=True))
    return output.token_ids


def write_single_file(folder: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("model-*"):
        tensors |= load_file(shard)
    save_file(tensors, folder / "model.safetensors")


def change_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in (index["weight_map"] | changes).items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.processes)])
def test_a_stale_index_beside_a_good_file(folder: Path, ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    expected = tokens_of(folder, 1)
    write_single_file(folder)
    for shard in folder.glob("model-*"):
        shard.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="antiphon"):
        assert tokens_of(folder, ranks) == expected
    (message,) = caplog.messages
    assert f"{folder}: model.safetensors is read, not the index beside it: 2 of the 2 files" in message


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.processes)])
def test_an_index_that_lacks_a_tensor_of_one_rank(folder: Path, ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    """Then all ranks read the single file, even one whose tensors are all in the index."""
    expected = tokens_of(folder, 1)
    write_single_file(folder)
    for shard in folder.glob("model-*"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(shard).items()}, shard)
    change_index(folder, **{"model.layers.3.mlp.experts.31.up_proj.weight": None})
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="antiphon"):
        assert tokens_of(folder, ranks) == expected
    assert len(caplog.messages) == 1


def test_a_warning_before_the_ranks_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_index(folder, **{"visual.weight": "model-00001-of-00002.safetensors"})
    with caplog.at_level(logging.WARNING, logger="antiphon"):
        tokens_of(folder, 1)
    assert caplog.messages == [f"{folder}: 1 tensor of the checkpoint is not read: visual.weight"]


@pytest.mark.processes
def test_a_server_warns_too(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_index(folder, **{"visual.weight": "model-00001-of-00002.safetensors"})

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(model=str(folder), device="cpu", max_model_len=64))
        engine.attach()
        await engine.close()

    with caplog.at_level(logging.WARNING, logger="antiphon"):
        asyncio.run(main())
    assert caplog.messages == [f"{folder}: 1 tensor of the checkpoint is not read: visual.weight"]
