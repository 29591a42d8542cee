"""A model and its checkpoint brought together: which files are read, and what a tied head is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from antiphon.core.errors import ModelError
from antiphon.models import (
    Checkpoint,
    MatchedCheckpoint,
    MatchedFiles,
    load_weights,
    match_checkpoint,
    read_config,
    skeleton,
)
from antiphon.models.checkpoint.files import missing_files
from antiphon.models.checkpoint.hub import _is_complete
from antiphon.models.config import DOWNLOAD_AGAIN
from antiphon.models.decoder import Decoder, DecoderConfig
from tests.models.test_parity import NUM_TOKENS, TOLERANCE, part_of
from tests.models.twin import (
    KINDS,
    Twin,
    change_tensors,
    load_theirs,
    random_checkpoint,
    random_ids,
    relative_error,
    scattered_blocks,
)
from tests.support.errors import raises

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
A_WEIGHT = "model.layers.1.mlp.experts.5.up_proj.weight"


def match(folder: Path) -> MatchedCheckpoint:
    return match_checkpoint(read_config(folder), folder)


def error_of(folder: Path) -> ModelError:
    with raises(ModelError) as raised:
        match(folder)
    assert "\n" not in str(raised.error) and isinstance(raised.error, ModelError)
    return raised.error


def the_note(folder: Path) -> str:
    (note,) = match(folder).notes
    assert str(folder) in note
    return note


def spread(folder: Path) -> None:
    """Replace the single file by two shards and their index."""
    tensors = load_file(folder / SINGLE)
    places = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / SINGLE).unlink()
    write_index(folder, places)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map(folder: Path) -> dict[str, str]:
    places: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return places


# ---- a tied head


def other_head(embedding: torch.Tensor) -> torch.Tensor:
    return torch.randn(embedding.shape, generator=torch.Generator().manual_seed(9)) * 0.3


def nearly_the_same(embedding: torch.Tensor) -> torch.Tensor:
    head = embedding.clone()
    head[-1, -1] += 1.0
    return head


CHANGES: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor | None]]] = {
    "embedding alone": lambda embedding: {},
    "head alone": lambda embedding: {EMBEDDING: None, HEAD: embedding},
    "both, equal": lambda embedding: {HEAD: embedding.clone()},
    "both, different": lambda embedding: {HEAD: other_head(embedding)},
    "both, different at the end": lambda embedding: {HEAD: nearly_the_same(embedding)},
    "both, in other dtypes": lambda embedding: {HEAD: other_head(embedding).bfloat16()},
}


@pytest.mark.parametrize(
    ("kind", "case", "in_shards"),
    [*((kind, case, False) for kind in KINDS for case in CHANGES), *((KINDS[0], case, True) for case in CHANGES)],
)
def test_a_tied_head_is_what_transformers_makes_of_it(tmp_path: Path, kind: str, case: str, in_shards: bool) -> None:
    random_checkpoint(tmp_path, kind=kind, tie_word_embeddings=True)
    change_tensors(tmp_path, **CHANGES[case](load_file(tmp_path / SINGLE)[EMBEDDING]))
    if in_shards:
        spread(tmp_path)
    twin = Twin.load(load_theirs(tmp_path, kind), tmp_path)
    ids = random_ids(NUM_TOKENS, seed=5)
    (blocks,) = scattered_blocks(1, NUM_TOKENS)
    logits = twin.our_logits([part_of(ids, 0, NUM_TOKENS, blocks)])
    assert relative_error(logits, twin.their_logits(ids)) < TOLERANCE
    if "both, " in case and "equal" not in case:
        assert f"{HEAD!r} is used as the head, though config.json has tie_word_embeddings=true" in the_note(tmp_path)
        assert f"not the same as {EMBEDDING!r}; set tie_word_embeddings to false" in the_note(tmp_path)
    else:
        assert match(tmp_path).notes == ()
    assert (twin.ours.lm_head is None) == ("different" not in case and "dtypes" not in case)


def test_two_heads_are_compared_stripe_by_stripe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antiphon.models.checkpoint.files._STRIPE_NUMBERS", 50)  # two rows
    random_checkpoint(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / SINGLE)[EMBEDDING]
    for row, same in ((0, False), (33, False), (embedding.shape[0] - 1, False), (None, True)):
        head = embedding.clone()
        if row is not None:
            head[row, 3] += 1e-3
        change_tensors(tmp_path, **{HEAD: head})
        assert Checkpoint(tmp_path).same(EMBEDDING, HEAD) is same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [None, *CHANGES])
def test_names_and_shapes_are_made_once(
    tmp_path: Path, kind: str, case: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the resolved model, though made before the head was resolved. case: None is not tied."""
    random_checkpoint(tmp_path, kind=kind, tie_word_embeddings=case is not None)
    if case is not None:
        change_tensors(tmp_path, **CHANGES[case](load_file(tmp_path / SINGLE)[EMBEDDING]))
    single = load_file(tmp_path / SINGLE)
    if EMBEDDING in single:  # names are looked at for the choice of files, too
        spread(tmp_path)
        save_file(single, tmp_path / SINGLE, metadata={"format": "pt"})
        write_index(tmp_path, {name: file for name, file in weight_map(tmp_path).items() if name != EMBEDDING})
    made: list[Decoder] = []
    checked: list[tuple[str, tuple[int, ...]]] = []

    def counted(config: DecoderConfig) -> Decoder:
        made.append(skeleton(config))
        return made[-1]

    def check(checkpoint: Checkpoint, expected: Iterable[tuple[str, torch.Tensor]]) -> None:
        checked.extend((name, tuple(tensor.shape)) for name, tensor in expected)

    monkeypatch.setattr("antiphon.models.match.skeleton", counted)
    monkeypatch.setattr("antiphon.models.match.check_checkpoint", check)
    matched = match(tmp_path)
    assert matched.files.single_file
    assert len(made) == 1
    needed = skeleton(matched.config).checkpoint_tensors()
    assert checked == [(name, tuple(tensor.shape)) for name, tensor in needed]


# ---- what another process is told


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("in_shards", [False, True])
def test_another_process_goes_by_what_was_found(
    tmp_path: Path, case: str, in_shards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, **CHANGES[case](load_file(tmp_path / SINGLE)[EMBEDDING]))
    if in_shards:
        spread(tmp_path)
    matched = match(tmp_path)
    files = msgspec.json.decode(msgspec.json.encode(matched.files), type=MatchedFiles)
    for name in ("same", "tensor"):
        monkeypatch.setattr(Checkpoint, name, None)
    assert files.single_file is not in_shards
    assert files.resolve(read_config(tmp_path)) == matched.config
    assert files.open(tmp_path).names() == matched.checkpoint.names()


def test_matched_files_that_have_gone_are_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    random_checkpoint(folder)
    shutil.copytree(folder, tmp_path / "single")
    spread(folder)
    shards = match(folder).files
    assert not shards.single_file
    shutil.copy(tmp_path / "single" / SINGLE, folder)  # another checkpoint, for all that is known of it
    gone = sorted(folder.glob("model-*"))[0]
    gone.unlink()
    model = skeleton(read_config(folder)).to_empty(device="cpu")
    with raises(ModelError, "1 of 2", gone.name):
        load_weights(shards.open(folder), model.checkpoint_tensors())
    single = match(folder).files
    assert single.single_file
    (folder / SINGLE).unlink()
    with raises(ModelError, SINGLE, remedy=DOWNLOAD_AGAIN):
        single.open(folder)
    (folder / INDEX).unlink()
    with raises(ModelError, INDEX):
        shards.open(folder)


def test_a_tied_head_of_another_shape(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, **{HEAD: torch.randn(60, 24)})
    error = error_of(tmp_path)
    assert repr(HEAD) in error.fact and "[60, 24]" in error.fact and "[61, 24]" in error.limit


def test_neither_embedding_nor_head(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, **{EMBEDDING: None})
    assert f"no tensor {EMBEDDING!r}" in error_of(tmp_path).fact


@pytest.mark.parametrize("missing", [EMBEDDING, HEAD])
def test_what_is_not_tied_needs_both(tmp_path: Path, missing: str) -> None:
    random_checkpoint(tmp_path)
    change_tensors(tmp_path, **{missing: None})
    assert f"no tensor {missing!r}" in error_of(tmp_path).fact


# ---- an index and a single file beside it


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A single file that is good, and the shards and index of another model, which are good too."""
    other = tmp_path / "other"
    random_checkpoint(other, seed=2)
    spread(other)
    folder = tmp_path / "both"
    random_checkpoint(folder)
    for path in other.iterdir():
        shutil.copy(path, folder / path.name)
    return folder


def loaded(matched: MatchedCheckpoint) -> dict[str, torch.Tensor]:
    model = skeleton(matched.config).to_empty(device="cpu")
    load_weights(matched.checkpoint, model.checkpoint_tensors())
    return dict(model.checkpoint_tensors())


def assert_read(folder: Path, file: str) -> None:
    """Every tensor comes from the single file, or none; and the files that are missing are those that are needed."""
    matched = match(folder)
    single = load_file(folder / SINGLE)
    same = [torch.equal(tensor, single[name]) for name, tensor in loaded(matched).items() if name in single]
    assert all(same) if file == SINGLE else not any(same)
    assert missing_files(folder) == []
    assert _is_complete(folder, weights=True)
    assert Checkpoint(folder, single_file=matched.checkpoint.single_file).single_file == (file == SINGLE)


def test_a_good_index_wins(both: Path) -> None:
    assert_read(both, INDEX)
    assert f"the files of {INDEX} are read, not {SINGLE} beside it" in the_note(both)


@pytest.mark.parametrize("content", [b"", b"half of a fi"])
def test_a_good_index_wins_over_a_broken_file(both: Path, content: bytes) -> None:
    (both / SINGLE).write_bytes(content)
    assert f"the files of {INDEX} are read" in the_note(both)
    assert not match(both).checkpoint.single_file


def test_a_good_index_wins_over_a_part(both: Path) -> None:
    change_tensors(both, **{A_WEIGHT: None})
    assert_read(both, INDEX)


@pytest.mark.parametrize("num_missing", [1, 2])
def test_an_index_whose_shards_are_missing(both: Path, num_missing: int) -> None:
    shards = sorted(both.glob("model-*"))[:num_missing]
    for path in shards:
        path.unlink()
    assert_read(both, SINGLE)
    note = the_note(both)
    assert f"{SINGLE} is read, not the index beside it: {num_missing} of the 2 files" in note
    assert f"are missing, such as {shards[0].name}" in note


def test_an_index_that_lacks_tensors(both: Path) -> None:
    write_index(both, {name: file for name, file in weight_map(both).items() if name != A_WEIGHT})
    assert_read(both, SINGLE)
    assert f"{SINGLE} is read, not the index beside it, which lacks {A_WEIGHT!r}" in the_note(both)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}']
)
def test_an_index_that_cannot_be_used(both: Path, content: str) -> None:
    (both / INDEX).write_text(content)
    assert_read(both, SINGLE)
    assert f"{SINGLE} is read, not the index beside it" in the_note(both)


def test_neither_has_everything(both: Path) -> None:
    """With a stale index and a partial file, the error says why the file is read."""
    change_tensors(both, **{A_WEIGHT: None})
    write_index(both, {name: file for name, file in weight_map(both).items() if name != A_WEIGHT})
    assert error_of(both).fact.endswith(f"no tensor {A_WEIGHT!r}")
    for path in both.glob("model-*"):
        path.unlink()
    fact = error_of(both).fact
    assert all(name in fact for name in (f"no tensor {A_WEIGHT!r}", SINGLE, "2 of the 2"))


def test_files_that_are_missing(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    assert missing_files(tmp_path) == []
    (tmp_path / SINGLE).unlink()
    assert missing_files(tmp_path) == [SINGLE]
    (tmp_path / SINGLE).mkdir()
    assert missing_files(tmp_path) == [SINGLE]
    assert INDEX in error_of(tmp_path).fact
    (tmp_path / SINGLE).rmdir()
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    assert missing_files(tmp_path) == ["x.safetensors", "y.safetensors"]
    (tmp_path / "y.safetensors").mkdir()
    assert missing_files(tmp_path) == ["x.safetensors", "y.safetensors"]


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "a/../../elsewhere.safetensors", "", "a\0b", "/ABSOLUTE"])
def test_files_outside_of_the_folder_are_never_opened(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    random_checkpoint(folder)
    spread(folder)
    shutil.copy(next(folder.glob("model-*")), tmp_path / "elsewhere.safetensors")
    name = name.replace("/ABSOLUTE", str(tmp_path / "elsewhere.safetensors"))
    write_index(folder, weight_map(folder) | {A_WEIGHT: name})
    monkeypatch.setattr("antiphon.models.checkpoint.files.safe_open", None)
    error = error_of(folder)
    assert repr(name) in error.fact and error.limit and error.remedy == DOWNLOAD_AGAIN
    with raises(ModelError, repr(name)):
        missing_files(folder)


def test_shards_may_be_in_folders_and_behind_links(tmp_path: Path) -> None:
    """The cache of the hub is made of links to files elsewhere."""
    folder, blobs = tmp_path / "model", tmp_path / "blobs"
    random_checkpoint(folder)
    spread(folder)
    (folder / "part").mkdir()
    blobs.mkdir()
    first, second = sorted(folder.glob("model-*"))
    first.rename(blobs / "0")
    first.symlink_to(Path("..") / "blobs" / "0")
    second.rename(folder / "part" / second.name)
    write_index(
        folder,
        {name: f"part/{file}" if file == second.name else file for name, file in weight_map(folder).items()},
    )
    assert match(folder).notes == ()
    stored = load_file(first) | load_file(folder / "part" / second.name)
    read = loaded(match(folder))
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())
