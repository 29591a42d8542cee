"""Workers use what the frontend passes to them, and neither match the checkpoint nor compare tensors again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from antiphon import LLM
from antiphon.comm import RankGroup
from antiphon.config.engine_config import EngineConfig, ResolvedConfig
from antiphon.core.errors import ModelError
from antiphon.engine.build import build_engine
from antiphon.engine.worker import WorkerStart
from antiphon.launch.local import LocalRanks
from antiphon.models import Checkpoint, MatchedFiles
from tests.support.checkpoints import copy_bundled
from tests.support.errors import raises

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SINGLE = "model.safetensors"


def add_single_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None) -> None:
    """Write all tensors of the shards to a single file next to them. change: called with the tensors before."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("model-*"):
        tensors |= load_file(shard)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def as_it_is(folder: Path) -> None:
    """Shards with their index; the embeddings are tied, and only the embedding is stored."""


def shard_missing(folder: Path) -> None:
    """Makes the single file next to the index the one that is read."""
    add_single_file(folder)
    next(folder.glob("model-*")).unlink()


def equal_heads(folder: Path) -> None:
    add_single_file(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    next(folder.glob("model-*")).unlink()


def different_heads(folder: Path) -> None:
    add_single_file(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    next(folder.glob("model-*")).unlink()


def head_alone(folder: Path) -> None:
    add_single_file(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    next(folder.glob("model-*")).unlink()


CHECKPOINTS = [as_it_is, shard_missing, equal_heads, different_heads, head_alone]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_bundled(tmp_path)


def options(folder: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", max_model_len=64, kv_cache_memory=2**20, **changes)


def sent(start: WorkerStart) -> WorkerStart:
    """Return it as workers read it from their folder."""
    return msgspec.json.decode(msgspec.json.encode(start), type=WorkerStart)


class Opened:
    """Counts the files and tensors that are read from now on; matching and comparing raise an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: Counter[str] = Counter()
        self.tensors: Counter[str] = Counter()
        really_open, really_read = Checkpoint._open, Checkpoint.tensor

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the checkpoint is matched or compared again")

        def open_file(checkpoint: Checkpoint, file_name: str) -> Any:
            self.files[file_name] += 1
            return really_open(checkpoint, file_name)

        def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
            self.tensors[name] += 1
            return really_read(checkpoint, name)

        monkeypatch.setattr("antiphon.config.engine_config.match_checkpoint", refuse)
        monkeypatch.setattr("antiphon.models.match.skeleton", refuse)
        monkeypatch.setattr(Checkpoint, "same", refuse)
        monkeypatch.setattr(Checkpoint, "_open", open_file)
        monkeypatch.setattr(Checkpoint, "tensor", read)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_worker_has_the_configuration_of_the_frontend_without_reading_weights(
    folder: Path, checkpoint: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(folder)
    frontend = options(folder, ranks=2).resolve().with_end_tokens((2, 3))
    opened = Opened(monkeypatch)
    config = sent(WorkerStart.of(frontend)).resolve()
    assert config == replace(frontend, checkpoint_notes=())  # the frontend has logged them
    assert not opened.files and not opened.tensors


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_rank_opens_the_files_of_the_frontend_and_reads_each_tensor_once(
    folder: Path, checkpoint: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(folder)
    frontend = options(folder).resolve()
    assert frontend.matched is not None
    opened = Opened(monkeypatch)
    engine = build_engine(sent(WorkerStart.of(frontend)).resolve(), RankGroup(rank=0, size=1))
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert opened.files.keys() == (shards if checkpoint is as_it_is else {SINGLE})
    assert set(opened.tensors.values()) == {1}
    assert (EMBEDDING in opened.tensors) == (checkpoint is not head_alone)
    assert (HEAD in opened.tensors) == (checkpoint in (different_heads, head_alone))
    assert weights_of(engine) == weights_of(build_engine(frontend, RankGroup(rank=0, size=1)))


def weights_of(engine: Any) -> list[float]:
    return [parameter.double().sum().item() for parameter in engine.runner.model.parameters()]


def told(frontend: ResolvedConfig, **changes: Any) -> ResolvedConfig:
    """Return what a worker resolves if the frontend has found something else. changes: of `MatchedFiles`."""
    assert frontend.matched is not None
    return sent(
        msgspec.structs.replace(WorkerStart.of(frontend), matched=replace(frontend.matched, **changes))
    ).resolve()


def test_a_worker_reads_the_file_that_the_frontend_chose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_single_file(folder)
    frontend = options(folder).resolve()
    assert frontend.matched is not None and not frontend.matched.single_file
    opened = Opened(monkeypatch)
    build_engine(told(frontend, single_file=True), RankGroup(rank=0, size=1))
    assert opened.files.keys() == {SINGLE}


def test_a_worker_reads_the_head_that_the_frontend_chose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    equal_heads(folder)
    frontend = options(folder).resolve()
    opened = Opened(monkeypatch)
    build_engine(told(frontend, tied_embeddings=False), RankGroup(rank=0, size=1))
    assert opened.tensors[EMBEDDING] == opened.tensors[HEAD] == 1
    opened.tensors.clear()
    build_engine(told(frontend, embedding_name=HEAD), RankGroup(rank=0, size=1))
    assert opened.tensors[EMBEDDING] == 0 and opened.tensors[HEAD] == 1


def test_options_alone_match_the_checkpoint(folder: Path) -> None:
    different_heads(folder)
    config = options(folder).resolve()
    assert config.matched == MatchedFiles(single_file=True, tied_embeddings=False, embedding_name=EMBEDDING)
    assert len(config.checkpoint_notes) == 2


def test_dummy_weights_match_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = options(folder, load_format="dummy").resolve()
    opened = Opened(monkeypatch)
    assert frontend.matched is None and sent(WorkerStart.of(frontend)).resolve() == frontend
    build_engine(frontend, RankGroup(rank=0, size=1))
    assert not opened.files and not opened.tensors


@pytest.mark.processes
def test_a_file_that_goes_before_the_ranks_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file that has appeared since is another checkpoint: no rank may read it instead of the shards."""
    really_start = LocalRanks.start

    def start(ranks: LocalRanks, *words: Any) -> None:
        add_single_file(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()
        really_start(ranks, *words)

    monkeypatch.setattr(LocalRanks, "start", start)
    with raises(ModelError, "model-00002-of-00002.safetensors") as raised:
        LLM(str(folder), ranks=2, device="cpu", max_model_len=64)
    assert raised.error.remedy and raised.error.remedy not in raised.error.fact, "its fields came from the worker"
