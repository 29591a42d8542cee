"""The configuration that the engine needs of any model, and the reader of a Hugging Face `config.json`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antiphon.core.errors import ModelError, OptionError, is_number, is_whole
from antiphon.core.sampling import NEUTRAL_SAMPLING, ResolvedParams

logger = logging.getLogger("antiphon.models")

LARGEST_POSITION = 2**62

DOWNLOAD_AGAIN = "download it again"
USE_ANOTHER_MODEL = "use a model without it"

_LARGEST_SIZE = 2**31 - 1
"""The largest dimension of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes that every architecture has. Counts are of the whole model, not of a rank."""

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_experts: int
    top_k: int
    kv_width: int  # numbers per token and layer in the KV cache
    eos_token_ids: tuple[int, ...]
    sampling_defaults: tuple[tuple[str, float], ...] = ()  # of generation_config.json, by the names of `SamplingParams`


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises `ModelError` if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist", remedy="pass the folder of a Hugging Face checkpoint", option="model", value=path
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error})", remedy=DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object", remedy=DOWNLOAD_AGAIN)
    return value


class ConfigFile:
    """A `config.json`, read key by key; errors name the file, the key and the expected value."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = read_json(path)

    @property
    def architecture(self) -> str:
        names = self._values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise self.fault("architectures", names, remedy="name exactly one")
        return names[0]

    def fault(self, key: str, value: object, *, limit: str = "", remedy: str) -> ModelError:
        """The error for a key that is missing (`None`) or has a value that cannot be used."""
        return ModelError(f"{self.path} has {key}={value!r}", limit=limit, remedy=remedy, option=key, value=value)

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def count(self, key: str, *, minimum: int = 1, maximum: int = _LARGEST_SIZE) -> int:
        """A required integer."""
        value = self._values.get(key)
        if not is_whole(value) or value < minimum:
            raise self.fault(key, value, remedy=f"use an integer of at least {minimum}")
        if value > maximum:
            raise self.fault(key, value, limit=f"at most {maximum} is possible", remedy="use the model's own file")
        return value

    def positions(self) -> int:
        """The longest sequence according to the file. It may exceed `_LARGEST_SIZE`, because it is no tensor's size."""
        return self.count("max_position_embeddings", maximum=LARGEST_POSITION)

    def number(self, key: str, default: float) -> float:
        value = self._values.get(key, default)
        if not is_number(value):
            raise self.fault(key, value, remedy="use a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, value, remedy="use true or false")
        return value

    def require(self, key: str, supported: tuple[Any, ...], default: Any) -> None:
        """Refuse a checkpoint whose `key` is not one of the supported values."""
        value = self._values.get(key, default)
        if value not in supported:
            names = " or ".join(repr(item) for item in supported)
            raise self.fault(key, value, limit=f"only {names} is supported", remedy=USE_ANOTHER_MODEL)

    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence tokens of `config.json` and `generation_config.json`; the tokenizer may add another one.

        Warns if the second file lacks some of the first. Ids beyond the vocabulary are dropped with a warning.
        """
        generation = self.path.with_name("generation_config.json")
        own = self._end_tokens(self.path, self._values)
        generating = self._end_tokens(generation, read_json(generation)) if generation.exists() else ()
        if generating and not set(own) <= set(generating):
            logger.warning(
                "%s has eos_token_id=%s, but %s %s: each of these tokens ends a text",
                self.path,
                list(own),
                generation.name,
                list(generating),
            )
        return tuple(dict.fromkeys([*generating, *own]))

    def sampling_defaults(self) -> tuple[tuple[str, float], ...]:
        """The sampling parameters in `generation_config.json`; `do_sample: false` means temperature 0."""
        path = self.path.with_name("generation_config.json")
        values = read_json(path) if path.exists() else {}
        if values.get("do_sample") is False:
            return (("temperature", 0.0),)
        found = [(name, values[name]) for name in NEUTRAL_SAMPLING if values.get(name) is not None]
        try:
            ResolvedParams(**dict(found))
        except OptionError as error:
            raise ModelError(
                f"{path} has {error.fact}",
                limit=error.limit,
                remedy=error.remedy,
                option=error.option,
                value=error.value,
            ) from error
        return tuple(found)

    def _end_tokens(self, path: Path, values: dict[str, Any]) -> tuple[int, ...]:
        value = values.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(is_whole(item) for item in ids):
            raise ModelError(
                f"{path} has eos_token_id={value!r}", remedy="use token ids", option="eos_token_id", value=value
            )
        vocab_size = self.count("vocab_size")
        known = tuple(item for item in ids if 0 <= item < vocab_size)
        if len(known) < len(ids):
            logger.warning("%s has eos_token_id=%r, but tokens from 0 to %d only", path, value, vocab_size - 1)
        return known
