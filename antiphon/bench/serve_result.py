"""The file of a serving benchmark's result: one JSON object, under the name that load, model and date give it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from antiphon.bench.conditions import check_writable

__all__ = ["DETAILS", "check_result_path", "result_path", "without_details", "write_result"]

DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")


def result_path(result: dict[str, Any], folder: Path | None, name: str | None) -> Path:
    """Where it goes; `name` as given, in `folder` or here."""
    if name is None:
        concurrency = f"-concurrency{result['max_concurrency']}" if result["max_concurrency"] is not None else ""
        model = re.sub(r"[^\w.-]", "_", result["model_id"].rsplit("/", 1)[-1])
        name = f"{result['endpoint_type']}-{result['request_rate']}qps{concurrency}-{model}-{result['date']}.json"
    return (folder or Path()) / name


def check_result_path(folder: Path | None, name: str | None) -> None:
    """Before something is measured: raises `OptionError` if nothing can be written there."""
    path = (folder or Path()) / (name or ".antiphon-result.json")  # its own name is not known before
    check_writable(path, "result-dir" if name is None else "result-filename")


def without_details(result: dict[str, Any]) -> dict[str, Any]:
    """Without what there is one of for every request."""
    return {key: value for key, value in result.items() if key not in DETAILS}


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write it whole. Raises `OSError` if that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, allow_nan=False, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character, cut off by a limit of tokens
