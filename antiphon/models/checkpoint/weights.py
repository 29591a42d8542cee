"""Loading weights: the tensors that a rank needs are checked against the model and read into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from antiphon.core.errors import ModelError
from antiphon.models.checkpoint.block_fp8 import scale_name
from antiphon.models.checkpoint.files import FLOAT8, ITEM_BYTES, Checkpoint, StoredTensor
from antiphon.models.config import DOWNLOAD_AGAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How much of its weights one rank has read; prints as "35% of 14.2 GB"."""

    tensors: int
    num_tensors: int
    bytes: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.bytes / max(self.num_bytes, 1):.0%} of {self.num_bytes / 1e9:.1f} GB"


def check_checkpoint(checkpoint: Checkpoint, expected: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Compare names, shapes and dtypes with the headers of the files, scales of quantized weights included.

    Raises `ModelError` for the first tensor that does not fit.
    """
    for name, tensor in expected:
        stored = checkpoint.stored(name)
        if stored.shape != tuple(tensor.shape):
            raise ModelError(
                f"checkpoint {checkpoint.folder} has {name!r} with shape {list(stored.shape)}",
                limit=f"its config.json needs {list(tensor.shape)}",
                remedy="use the config.json that was published with these weights",
            )
        if scale_name(name) in checkpoint:
            _check_quantized(checkpoint, name, stored)
        elif stored.dtype == FLOAT8:
            raise ModelError(
                f"checkpoint {checkpoint.folder} has {name!r} in float8, but no scale {scale_name(name)!r}",
                remedy="download it again, or use a bfloat16 checkpoint",
            )
        elif stored.dtype not in ITEM_BYTES:
            raise ModelError(
                f"checkpoint {checkpoint.folder} has {name!r} in the unsupported dtype {stored.dtype}",
                remedy="use a checkpoint in bfloat16, float16, float32, or block-wise float8",
            )


def _check_quantized(checkpoint: Checkpoint, name: str, stored: StoredTensor) -> None:
    block, scale = checkpoint.block_fp8, checkpoint.stored(scale_name(name))
    where = f"checkpoint {checkpoint.folder} has"
    if block is None:
        raise ModelError(
            f"{where} {scale_name(name)!r}, but its config.json has no quantization_config with a weight_block_size",
            remedy="use the config.json that was published with these weights",
        )
    if stored.dtype != FLOAT8 or len(stored.shape) != 2:
        raise ModelError(
            f"{where} {scale_name(name)!r} beside a tensor {list(stored.shape)} in {stored.dtype}",
            limit=f"only matrices in {FLOAT8} are scaled",
            remedy="download it again, or use a bfloat16 checkpoint",
        )
    needed = block.scale_shape(*stored.shape)
    if scale.shape != needed or scale.dtype not in ITEM_BYTES:
        raise ModelError(
            f"{where} {scale_name(name)!r} with shape {list(scale.shape)} in {scale.dtype}",
            limit=f"blocks of {block.rows} x {block.columns} need {list(needed)} in a float format",
            remedy=DOWNLOAD_AGAIN,
        )


def load_weights(
    checkpoint: Checkpoint,
    targets: Iterable[tuple[str, torch.Tensor]],
    *,
    progress: Callable[[LoadProgress], None] | None = None,
) -> None:
    """Read every named tensor into its target, converting the dtype and dequantizing where needed.

    Only these tensors and their scales are read from disk.
    progress: called after every tensor.
    Raises `ModelError` for what `check_checkpoint` refuses, before the first tensor is read.
    """
    target_of = dict(targets)
    check_checkpoint(checkpoint, target_of.items())
    bytes_of = {name: _bytes_to_read(checkpoint, name) for name in target_of}
    num_bytes, bytes_read = sum(bytes_of.values()), 0
    for number, name in enumerate(checkpoint.in_file_order(target_of), start=1):
        _fill(target_of[name], checkpoint, name)
        bytes_read += bytes_of[name]
        if progress is not None:
            progress(LoadProgress(tensors=number, num_tensors=len(target_of), bytes=bytes_read, num_bytes=num_bytes))


def _bytes_to_read(checkpoint: Checkpoint, name: str) -> int:
    names = [name, scale_name(name)] if scale_name(name) in checkpoint else [name]
    return sum(checkpoint.stored(each).num_bytes for each in names)


def _fill(target: torch.Tensor, checkpoint: Checkpoint, name: str) -> None:
    stored = checkpoint.tensor(name)
    if scale_name(name) not in checkpoint:
        target.copy_(stored)
        return
    assert checkpoint.block_fp8 is not None, "check_checkpoint has refused it"
    # Dequantized on the target's device: there may be hundreds of gigabytes, and the CPU is slow at it.
    scale = checkpoint.tensor(scale_name(name)).to(target.device)
    checkpoint.block_fp8.dequantize(stored.to(target.device), scale, target)
