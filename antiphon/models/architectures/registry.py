"""The readers of all architectures by the name in `config.json`; adding one takes one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from antiphon.core.errors import ModelError, did_you_mean
from antiphon.models.checkpoint.block_fp8 import BlockFp8
from antiphon.models.checkpoint.presets import PRESETS, packaged_models, preset_file
from antiphon.models.config import ConfigFile, ModelConfig
from antiphon.models.decoder import DecoderConfig

Reader = Callable[[ConfigFile], DecoderConfig]
"""Reads a `config.json`. Raises `ModelError` for keys that are missing, wrong or unsupported."""

READERS = {
    "DeepseekV3ForCausalLM": "antiphon.models.architectures.deepseek:read_deepseek_v3",
    "DeepseekV2ForCausalLM": "antiphon.models.architectures.deepseek:read_deepseek_v2",
    "Qwen3MoeForCausalLM": "antiphon.models.architectures.qwen3_moe:read_qwen3_moe",
    "Glm4MoeForCausalLM": "antiphon.models.architectures.glm4_moe:read_glm4_moe",
    "MixtralForCausalLM": "antiphon.models.architectures.mixtral:read_mixtral",
}
"""The module and function of each architecture's `Reader`."""


def read_config(source: Path | str, *, num_layers: int | None = None) -> ModelConfig:
    """The configuration of the model in a folder, or of a preset. num_layers: load only the first N layers.

    An existing folder wins over a preset of the same name.
    Raises `ModelError` if the model is missing, unknown or not supported, or has fewer than `num_layers` layers.
    """
    file = ConfigFile(_config_file(source))
    read = _reader(file)
    BlockFp8.read(file)  # refuses quantization that is not supported
    config = read(file)
    if num_layers is None:
        return config
    least = config.num_dense_layers + 1
    if not least <= num_layers <= config.num_layers:
        raise ModelError(
            f"num_layers={num_layers} does not fit {source}",
            limit=f"it has {config.num_layers} layers, of which the first {config.num_dense_layers} are dense",
            remedy=f"use {least} to {config.num_layers}",
            option="num_layers",
            value=num_layers,
        )
    return replace(config, num_layers=num_layers)


def _reader(file: ConfigFile) -> Reader:
    name = file.architecture
    if name not in READERS:
        raise ModelError(
            f"{file.path} has an unknown architecture {name!r}",
            remedy=f"use a model with one of {', '.join(READERS)}{did_you_mean(name, READERS)}",
            option="architectures",
            value=name,
        )
    module, _, function = READERS[name].partition(":")
    reader: Reader = getattr(import_module(module), function)
    return reader


def _config_file(source: Path | str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder / "config.json"
    if str(source) in PRESETS:
        return preset_file(str(source))
    raise ModelError(
        f"model {str(source)!r} is not a folder",
        remedy=f"pass the folder of a Hugging Face checkpoint (nothing is downloaded), {packaged_models(source)}",
        option="model",
        value=source,
    )
