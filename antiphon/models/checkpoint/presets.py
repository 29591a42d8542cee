"""Published model shapes that come with the package, for runs with dummy weights: `config.json` without weights."""

from __future__ import annotations

from pathlib import Path

from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import did_you_mean

PRESETS = ("deepseek-v2-lite", "deepseek-v3", "glm-4.5-air", "mixtral-8x7b", "qwen3-235b-a22b", "qwen3-30b-a3b")
"""Sizes are as published, except that DeepSeek-V3 is without the block-wise float8 of its checkpoint, and none has the
extra layers for multi-token prediction."""


def packaged_models(near: object) -> str:
    """The end of a remedy: the models of this package, and whether the one with the nearest name is meant."""
    hint = did_you_mean(near, [BUNDLED_MODEL, *PRESETS])
    return f"the bundled {BUNDLED_MODEL!r}, or for dummy weights one of {', '.join(PRESETS)}{hint}"


def preset_file(name: str) -> Path:
    """The `config.json` of a preset. name: one of `PRESETS`."""
    assert name in PRESETS, name
    return Path(__file__).parents[2] / "data" / "presets" / f"{name}.json"
