"""A model and the checkpoint in a folder, brought together: by names and headers, before a process starts.

matched = match_checkpoint(read_config(folder), folder)
model = build_model(matched.config, transport)
load_weights(matched.checkpoint, model.checkpoint_tensors())
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from antiphon.core.errors import ModelError
from antiphon.models.checkpoint import Checkpoint
from antiphon.models.config import ModelConfig
from antiphon.models.decoder import EMBEDDING_NAME, HEAD_NAME, DecoderConfig
from antiphon.models.registry import skeleton
from antiphon.models.unread import check_unread
from antiphon.models.weights import check_checkpoint

__all__ = ["MatchedCheckpoint", "match_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedCheckpoint:
    """config: the model as the checkpoint has it. notes: sentences about what is not as one would think."""

    config: ModelConfig
    checkpoint: Checkpoint
    notes: tuple[str, ...]


def match_checkpoint(config: ModelConfig, folder: Path) -> MatchedCheckpoint:
    """Choose the files, settle the head, and see that every tensor has its place.

    Reads headers; of tensors only the embedding and a head that the configuration says are the same.
    Raises `ModelError` for tensors that are missing or do not fit, and for those that the model has no place for though
    they would change its results.
    """
    assert isinstance(config, DecoderConfig), "configs come from read_config"
    checkpoint, files_note = _choose_files(config, folder)
    config, head_note = _settle_head(config, checkpoint)
    check_checkpoint(checkpoint, skeleton(config).checkpoint_tensors())
    notes = (files_note, head_note, check_unread(checkpoint, config, set(_names(config))))
    return MatchedCheckpoint(config=config, checkpoint=checkpoint, notes=tuple(note for note in notes if note))


def _choose_files(config: DecoderConfig, folder: Path) -> tuple[Checkpoint, str]:
    """The index and its shards, unless only the single file beside them has everything; and a note where both exist."""
    checkpoint = Checkpoint(folder)
    if checkpoint.single_file:
        fault = checkpoint.index_fault
        return checkpoint, f"{folder}: model.safetensors is read, not the index beside it: {fault}" if fault else ""
    if not checkpoint.has_other_file:
        return checkpoint, ""
    lacking = next((name for name in _names(config) if name not in checkpoint), None)
    if lacking is not None:
        with suppress(ModelError):  # of a file that cannot be opened either
            single = Checkpoint(folder, single_file=True)
            if all(name in single for name in _names(config)):
                return single, f"{folder}: model.safetensors is read, not the index beside it, which lacks {lacking!r}"
    return checkpoint, f"{folder}: the files of model.safetensors.index.json are read, not model.safetensors beside it"


def _names(config: DecoderConfig) -> Iterator[str]:
    return (name for name, _ in skeleton(config).checkpoint_tensors())


def _settle_head(config: DecoderConfig, checkpoint: Checkpoint) -> tuple[DecoderConfig, str]:
    """Where embedding and head are said to be one, the file decides, as in transformers 5.

    Two that differ stay two, with a note; the one that is there alone is both, whatever its name.
    """
    if not config.tied_embeddings or HEAD_NAME not in checkpoint:
        return config, ""
    if EMBEDDING_NAME not in checkpoint:
        return replace(config, embedding_name=HEAD_NAME), ""
    if checkpoint.same(EMBEDDING_NAME, HEAD_NAME):
        return config, ""
    note = (
        f"{checkpoint.folder}: {HEAD_NAME!r} is used as the head, though config.json has tie_word_embeddings=true: it "
        f"is not the same as {EMBEDDING_NAME!r}; set tie_word_embeddings to false if that is right"
    )
    return replace(config, tied_embeddings=False), note
