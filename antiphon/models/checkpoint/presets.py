"""Published model shapes that come with the package, for runs with dummy weights: `config.json` without weights."""

from __future__ import annotations

from pathlib import Path

PRESETS = ("deepseek-v2-lite", "deepseek-v3", "glm-4.5-air", "mixtral-8x7b", "qwen3-235b-a22b", "qwen3-30b-a3b")
"""Sizes are as published, except that DeepSeek-V3 is without the block-wise float8 of its checkpoint, and none has the
extra layers for multi-token prediction."""


def preset_file(name: str) -> Path:
    """The `config.json` of a preset. name: one of `PRESETS`."""
    assert name in PRESETS, name
    return Path(__file__).parents[2] / "data" / "presets" / f"{name}.json"
