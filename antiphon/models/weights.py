"""Checkpoints in safetensors: what is in them, what a rank needs, and the loading of just that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from antiphon.core.errors import ModelError
from antiphon.models.config import read_json

__all__ = ["Checkpoint", "check_checkpoint", "load_weights"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """The safetensors files of one folder. Opens files when they are needed and reads nothing before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_files: dict[str, Any] = {}
        if (folder / _INDEX).exists():
            weight_map = read_json(folder / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ModelError(f"{folder / _INDEX} has no weight_map of file names; download it again")
            self._file_of: dict[str, str] = weight_map
        elif (folder / _SINGLE).exists():
            self._file_of = dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        else:
            raise ModelError(
                f"{folder} has neither {_INDEX} nor {_SINGLE}; pass the folder of a safetensors checkpoint"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header of the file. Raises `ModelError` if the tensor is missing."""
        return tuple(self._file_with(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, read now, on the CPU in the dtype that it is stored in."""
        try:
            tensor: torch.Tensor = self._file_with(name).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self.folder / self._file_of[name]} cannot be read ({error})") from error
        return tensor

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Names grouped by file, so that a file is read in one go."""
        return sorted(names, key=lambda name: (self._file_of.get(name, ""), name))

    def _file_with(self, name: str) -> Any:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise ModelError(
                f"checkpoint {self.folder} has no tensor {name!r}; download it again, or use its own config"
            )
        opened = self._open(file_name)
        if name not in opened.keys():  # noqa: SIM118 (not a dict)
            raise ModelError(
                f"checkpoint {self.folder} has no tensor {name!r}, though its index places it in {file_name}; "
                "download it again"
            )
        return opened

    def _open(self, file_name: str) -> Any:
        if file_name not in self._open_files:
            try:
                self._open_files[file_name] = safe_open(self.folder / file_name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self.folder / file_name} cannot be opened ({error}); download it again") from error
        return self._open_files[file_name]


def check_checkpoint(checkpoint: Checkpoint, expected: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Compare names and shapes with the headers of the files. Raises `ModelError` at the first that does not fit."""
    for name, tensor in expected:
        shape = checkpoint.shape(name)
        if shape != tuple(tensor.shape):
            raise ModelError(
                f"checkpoint {checkpoint.folder} has {name!r} with shape {list(shape)}; "
                f"its config.json needs {list(tensor.shape)}"
            )


def load_weights(
    checkpoint: Checkpoint,
    targets: Iterable[tuple[str, torch.Tensor]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read every named tensor into its target, converting the dtype. Only these are read from disk.

    progress: called with (tensors read, tensors in all).
    Raises `ModelError` for missing tensors and wrong shapes.
    """
    target_of = dict(targets)
    check_checkpoint(checkpoint, target_of.items())
    for number, name in enumerate(checkpoint.in_file_order(target_of)):
        target_of[name].copy_(checkpoint.tensor(name))
        if progress is not None:
            progress(number + 1, len(target_of))
