"""Architectures by the name in `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch

from antiphon.comm import ExpertShape, RankGroup, Transport, create_transport
from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import ModelError
from antiphon.models.causal_lm import CausalLM
from antiphon.models.config import ConfigFile, ModelConfig
from antiphon.models.deepseek import DeepseekV3Config, DeepseekV3Model
from antiphon.runtime import CpuStreams

__all__ = ["KNOWN_ARCHITECTURES", "build_model", "expert_shape", "read_config", "skeleton"]


class _Architecture(NamedTuple):
    read_config: Callable[[ConfigFile], ModelConfig]
    build: Callable[[Any, Transport], CausalLM]  # takes the config that read_config gives


_ARCHITECTURES = {"DeepseekV3ForCausalLM": _Architecture(DeepseekV3Config.read, DeepseekV3Model)}

KNOWN_ARCHITECTURES = tuple(_ARCHITECTURES)


def read_config(folder: Path) -> ModelConfig:
    """The model in `folder`. Raises `ModelError` if it is not there, unknown, or asks for what is not supported."""
    if not folder.is_dir():
        raise ModelError(
            f"model {str(folder)!r} is not a folder; pass the folder of a Hugging Face checkpoint (nothing is "
            f"downloaded), or {BUNDLED_MODEL!r}, which is bundled"
        )
    file = ConfigFile(folder)
    if file.architecture not in _ARCHITECTURES:
        near = get_close_matches(file.architecture, KNOWN_ARCHITECTURES, n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ModelError(
            f"{file.path} has architecture {file.architecture!r}, which is not known; "
            f"known are {', '.join(KNOWN_ARCHITECTURES)}{hint}"
        )
    return _ARCHITECTURES[file.architecture].read_config(file)


def expert_shape(config: ModelConfig, dtype: torch.dtype) -> ExpertShape:
    """The experts of a model, for its transport."""
    return ExpertShape(num_experts=config.num_experts, top_k=config.top_k, hidden_size=config.hidden_size, dtype=dtype)


def build_model(config: ModelConfig, transport: Transport) -> CausalLM:
    """This rank's part of the model, weights not yet filled, in the dtype of the transport's shape."""
    with torch.device(transport.streams.device):
        return _ARCHITECTURES[config.architecture].build(config, transport)


def skeleton(config: ModelConfig) -> CausalLM:
    """The whole model without memory behind it: for the names and shapes that a checkpoint must have."""
    group = RankGroup(rank=0, size=1)
    with torch.device("meta"):
        transport = create_transport(
            "local", expert_shape(config, torch.float32), group=group, streams=CpuStreams(), num_lanes=1
        )
        return _ARCHITECTURES[config.architecture].build(config, transport)
