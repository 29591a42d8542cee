"""Loads a checkpoint's tokenizer. No code of the checkpoint is executed, whatever its files ask for.

transformers runs `tokenization_*.py` of a checkpoint if it is allowed to, and where nobody says, it asks at the
terminal: a "y" on standard input is enough. So every call here says no, and a `tokenizer.json` is loaded by the class
that needs nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from antiphon.core.errors import ModelError, first_line

_WHOLE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_NEVER = {"local_files_only": True, "trust_remote_code": False}
"""For every call that loads something: nothing is downloaded, and nothing of the checkpoint is executed."""


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a folder. Raises `ModelError` if it cannot be loaded without code of its own."""
    folder = Path(folder)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds, and only the front needs it

    is_whole = (folder / _WHOLE).exists()
    try:
        # AutoTokenizer converts files of other formats by classes of transformers itself.
        kind = PreTrainedTokenizerFast if is_whole else AutoTokenizer
        return kind.from_pretrained(str(folder), **_NEVER)
    except Exception as error:  # tokenizers raises no narrower class for a format that it does not know
        if not is_whole and (code := _code_asked_for(folder)):
            raise ModelError(
                f"the tokenizer in {folder} has no {_WHOLE}, only code ({code}), and code of a checkpoint is never "
                f"executed; put a {_WHOLE} into the folder, made where you trust that code: "
                "AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True).save_pretrained(FOLDER)"
            ) from error
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded ({first_line(error)}); "
            f"download it again{'' if is_whole else f', with its {_WHOLE}'}, or upgrade tokenizers and transformers"
        ) from error


def _code_asked_for(folder: Path) -> str:
    """What the checkpoint would have executed as its tokenizer; empty if nothing."""
    try:
        asked = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("auto_map", {})
    except (OSError, ValueError, AttributeError):
        return ""
    classes = asked.get("AutoTokenizer") if isinstance(asked, dict) else asked
    names = [name for name in (classes if isinstance(classes, list) else [classes]) if isinstance(name, str)]
    return ", ".join(names)
