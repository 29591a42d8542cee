"""The small trained model that comes with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED_MODEL = "tiny-deepseek"


def bundled_model() -> Path:
    """The folder of the bundled model; its MODEL_CARD.md describes it."""
    return Path(__file__).parent.parent / "data" / BUNDLED_MODEL
