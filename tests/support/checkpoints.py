"""Copies of the bundled checkpoint with other files beside its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from antiphon.core.bundled import bundled_model

__all__ = ["copy_bundled", "rewrite_json"]


def copy_bundled(folder: Path, **tokenizer_config: Any) -> Path:
    """`folder/model`; its weights are links. tokenizer_config: keys to set there, or with `None` to take away."""
    copy = folder / "model"
    copy.mkdir(parents=True)
    for path in bundled_model().iterdir():
        if path.suffix == ".safetensors":
            (copy / path.name).symlink_to(path)
        else:
            shutil.copy(path, copy)
    if "chat_template" in tokenizer_config:
        (copy / "chat_template.jinja").unlink()
    rewrite_json(copy / "tokenizer_config.json", **tokenizer_config)
    return copy


def rewrite_json(path: Path, **changes: Any) -> None:
    """Set keys of a file, or with `None` take them away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
