"""The small trained model that comes with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED_MODEL = "tiny-deepseek"


def bundled_model() -> Path:
    """Its folder; see MODEL_CARD.md there."""
    return Path(__file__).parent.parent / "data" / BUNDLED_MODEL
