"""Matching a model with the checkpoint in a folder, by names and headers, before any worker starts.

matched = match_checkpoint(read_config(folder), folder)
model = build_model(matched.config, transport)
load_weights(matched.checkpoint, model.checkpoint_tensors())
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from antiphon.core.errors import ModelError
from antiphon.models.build import skeleton
from antiphon.models.checkpoint.files import Checkpoint
from antiphon.models.checkpoint.weights import check_checkpoint
from antiphon.models.config import ModelConfig
from antiphon.models.decoder import EMBEDDING_NAME, HEAD_NAME, DecoderConfig
from antiphon.models.unread import check_unread


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedFiles:
    """The result of `match_checkpoint` as plain values, so that another process need not compare anything again.

    single_file: the checkpoint is model.safetensors, even if there is an index. tied_embeddings, embedding_name: as in
    `DecoderConfig`.
    """

    single_file: bool
    tied_embeddings: bool
    embedding_name: str

    def resolve(self, config: ModelConfig) -> DecoderConfig:
        """The configuration from `read_config`, adapted to the checkpoint."""
        assert isinstance(config, DecoderConfig), "configs come from read_config"
        return replace(config, tied_embeddings=self.tied_embeddings, embedding_name=self.embedding_name)

    def open(self, folder: Path) -> Checkpoint:
        """Open the files that were matched, never others instead. Raises `ModelError` if they have disappeared."""
        return Checkpoint(folder, single_file=self.single_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedCheckpoint:
    """A checkpoint and the configuration adapted to it. notes: one sentence for each thing that may surprise a user."""

    config: DecoderConfig
    checkpoint: Checkpoint
    notes: tuple[str, ...]

    @property
    def files(self) -> MatchedFiles:
        """What another process needs to open the same checkpoint."""
        return MatchedFiles(
            single_file=self.checkpoint.single_file,
            tied_embeddings=self.config.tied_embeddings,
            embedding_name=self.config.embedding_name,
        )


def match_checkpoint(config: ModelConfig, folder: Path) -> MatchedCheckpoint:
    """Choose the files, resolve the head, and check that the tensors fit the model.

    Only headers are read, except that with tied embeddings both matrices may be read to compare them.
    Raises `ModelError` for tensors that are missing or do not fit, and for tensors that would change the results but
    have no place in the model.
    """
    assert isinstance(config, DecoderConfig), "configs come from read_config"
    checkpoint = Checkpoint(folder)
    tensors = dict(skeleton(config).checkpoint_tensors())
    checkpoint, files_note = _choose_files(checkpoint, tensors)
    config, head_note = _resolve_head(config, checkpoint)
    tensors = _with_resolved_head(tensors, config)
    check_checkpoint(checkpoint, tensors.items())
    notes = (files_note, head_note, check_unread(checkpoint, config, tensors.keys()))
    return MatchedCheckpoint(config=config, checkpoint=checkpoint, notes=tuple(note for note in notes if note))


def _choose_files(checkpoint: Checkpoint, names: Collection[str]) -> tuple[Checkpoint, str]:
    """The shards of the index, or the single file if it alone is complete; and a note if both exist."""
    folder = checkpoint.folder
    if checkpoint.single_file:
        fault = checkpoint.index_fault
        return checkpoint, f"{folder}: model.safetensors is read, not the index beside it: {fault}" if fault else ""
    if not checkpoint.has_other_file:
        return checkpoint, ""
    lacking = next((name for name in names if name not in checkpoint), None)
    if lacking is not None:
        with suppress(ModelError):  # the single file may be broken too
            single = Checkpoint(folder, single_file=True)
            if all(name in single for name in names):
                return single, f"{folder}: model.safetensors is read, not the index beside it, which lacks {lacking!r}"
    return checkpoint, f"{folder}: the files of model.safetensors.index.json are read, not model.safetensors beside it"


def _resolve_head(config: DecoderConfig, checkpoint: Checkpoint) -> tuple[DecoderConfig, str]:
    """The configuration with the checkpoint's head, resolved as in transformers 5; and a note.

    With tied embeddings, two matrices that differ are both kept; a single one serves as both, whatever its name.
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


def _with_resolved_head(tensors: Mapping[str, torch.Tensor], config: DecoderConfig) -> dict[str, torch.Tensor]:
    """The tensors of the resolved model, made from those of the model in config.json, in the same order."""
    resolved = {config.embedding_name if name == EMBEDDING_NAME else name: tensor for name, tensor in tensors.items()}
    return resolved if config.tied_embeddings else {**resolved, HEAD_NAME: resolved[EMBEDDING_NAME]}
