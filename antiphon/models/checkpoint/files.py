"""The safetensors files of a checkpoint: which of them to read, what they contain, and access to single tensors.

Nothing here knows which tensors a model needs: `match` compares the two, and `weights` reads what a rank needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from antiphon.core.errors import ModelError
from antiphon.models.checkpoint.block_fp8 import BlockFp8, scale_name
from antiphon.models.config import DOWNLOAD_AGAIN, ConfigFile, read_json

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per number of the dtypes that need no scale, by their names in safetensors."""

FLOAT8 = "F8_E4M3"

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_STRIPE_NUMBERS = 2**24  # compared at a time


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's entry in the header of its file; dtype is the name in safetensors."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The files that a checkpoint is read from."""

    weight_map: dict[str, str] | None  # of the index; None: all tensors of the single file
    missing: list[str]
    index_fault: str = ""  # why the index is ignored, if it is


def missing_files(folder: Path) -> list[str]:
    """Files of weights that `Checkpoint` needs and that are not in the folder.

    Raises `ModelError` if the index cannot be used and there is no single file to read instead.
    """
    return _find_files(folder).missing


def _find_files(folder: Path) -> _Files:
    """The shards of the index, or the single file if there is no usable index."""
    has_single = (folder / _SINGLE).is_file()
    if not (folder / _INDEX).exists():
        return _Files(weight_map=None, missing=[] if has_single else [_SINGLE])
    try:
        weight_map = _weight_map(folder)
    except ModelError as error:
        if not has_single:
            raise
        return _Files(weight_map=None, missing=[], index_fault=str(error))
    names = set(weight_map.values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing and has_single:
        fault = f"{len(missing)} of the {len(names)} files that {_INDEX} names are missing, such as {missing[0]}"
        return _Files(weight_map=None, missing=[], index_fault=fault)
    return _Files(weight_map=weight_map, missing=missing)


def _chosen_files(folder: Path, *, single_file: bool) -> _Files:
    """The files that were chosen earlier, never others instead, even if they have disappeared."""
    if not single_file:
        return _Files(weight_map=_weight_map(folder), missing=[])
    if not (folder / _SINGLE).is_file():
        raise ModelError(f"{folder / _SINGLE} does not exist", remedy=DOWNLOAD_AGAIN)
    return _Files(weight_map=None, missing=[])


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{folder / _INDEX} has no weight_map of file names", remedy=DOWNLOAD_AGAIN)
    for name in set(weight_map.values()):
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
            raise ModelError(
                f"{folder / _INDEX} places tensors in {name!r}",
                limit="files outside the folder are never opened",
                remedy=DOWNLOAD_AGAIN,
            )
    return weight_map


class Checkpoint:
    """The safetensors files of one folder, each opened when it is first needed.

    single_file: True to read `model.safetensors` even if there is an index; False to read the shards of the index only.
    None reads the shards, or the single file if there is no index or if shards are missing.
    index_fault: why an index is ignored. has_other_file: whether there is a `model.safetensors` that is not read.
    Raises `ModelError` if there are no files, or if config.json names a quantization that is not supported.
    """

    def __init__(self, folder: Path, *, single_file: bool | None = None) -> None:
        self.folder = folder
        config = folder / "config.json"
        self.block_fp8 = BlockFp8.read(ConfigFile(config)) if config.exists() else None
        self._open_files: dict[str, tuple[Any, frozenset[str]]] = {}
        files = _find_files(folder) if single_file is None else _chosen_files(folder, single_file=single_file)
        self.index_fault = files.index_fault
        if files.weight_map is not None:
            self._file_of = files.weight_map
        elif (folder / _SINGLE).is_file():
            _, names = self._open(_SINGLE)
            self._file_of = dict.fromkeys(names, _SINGLE)
        else:
            raise ModelError(f"{folder} has neither {_INDEX} nor {_SINGLE}", remedy=_what_to_do(folder))
        self.single_file = files.weight_map is None
        self.has_other_file = (folder / _SINGLE).is_file() and _SINGLE not in self._file_of.values()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> set[str]:
        """The names of all tensors, whether the index lists them or not. Opens every file that exists."""
        found = set(self._file_of)
        for file_name in sorted(set(self._file_of.values())):
            if (self.folder / file_name).is_file():
                found |= self._open(file_name)[1]
        return found

    def stored(self, name: str) -> StoredTensor:
        """A tensor's entry in the header of its file. Raises `ModelError` if it is missing."""
        header = self._file_with(name).get_slice(name)
        return StoredTensor(tuple(header.get_shape()), header.get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor to the CPU, in its stored dtype."""
        try:
            tensor: torch.Tensor = self._file_with(name).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(
                f"{self.folder / self._file_of[name]} cannot be read ({error})", remedy=DOWNLOAD_AGAIN
            ) from error
        return tensor

    def same(self, first: str, second: str) -> bool:
        """Whether two matrices are stored with the same numbers; reads them up to the first difference.

        Quantized ones never are, because their values depend on their scales.
        """
        stored = self.stored(first)
        if stored != self.stored(second) or len(stored.shape) != 2 or stored.dtype not in ITEM_BYTES:
            return False
        if scale_name(first) in self or scale_name(second) in self:
            return False
        one, other = (self._file_with(name).get_slice(name) for name in (first, second))
        num_rows, num_columns = stored.shape
        step = max(1, _STRIPE_NUMBERS // max(1, num_columns))
        return all(
            torch.equal(one[start : start + step], other[start : start + step]) for start in range(0, num_rows, step)
        )

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Names grouped by file, so that a file is read in one go."""
        return sorted(names, key=lambda name: (self._file_of.get(name, ""), name))

    def _file_with(self, name: str) -> Any:
        file_name = self._file_of.get(name)
        if file_name is None:
            which = f" in {_SINGLE}, which is read because {self.index_fault}" if self.index_fault else ""
            raise ModelError(
                f"checkpoint {self.folder} has no tensor {name!r}{which}",
                remedy="download it again, or use its own config",
            )
        opened, names = self._open(file_name)
        if name not in names:
            raise ModelError(
                f"checkpoint {self.folder} has no tensor {name!r}, though its index places it in {file_name}",
                remedy=DOWNLOAD_AGAIN,
            )
        return opened

    def _open(self, file_name: str) -> tuple[Any, frozenset[str]]:
        if file_name not in self._open_files:
            path = self.folder / file_name
            if not path.is_file():
                files = set(self._file_of.values())
                missing = [name for name in files if not (self.folder / name).is_file()]
                raise ModelError(
                    f"{path} does not exist, though the index names it",
                    limit=f"{len(missing)} of {len(files)} files are missing",
                    remedy=DOWNLOAD_AGAIN,
                )
            try:
                opened: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be opened ({error})", remedy=DOWNLOAD_AGAIN) from error
            self._open_files[file_name] = opened, frozenset(opened.keys())
        return self._open_files[file_name]


def _what_to_do(folder: Path) -> str:
    others = sorted(path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern))
    if not others:
        return "pass the folder of a safetensors checkpoint"
    return (
        f"{others[0]} has another format, so use a safetensors version of the model, or write one with "
        "save_pretrained of transformers"
    )
