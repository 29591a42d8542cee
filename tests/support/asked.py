"""What configuration options ask for, without a start."""

from __future__ import annotations

import sys

import pytest

from antiphon import cli
from antiphon.config.engine_config import EngineConfig
from antiphon.core.options import check_options

__all__ = ["AskedError", "run_command", "stop_before_start"]


class AskedError(Exception):
    """Raised in place of a start."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.config = config


def stop_before_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM` raises `AskedError` where it would look at the model, for what is refused there is ours."""

    def resolve(config: EngineConfig) -> None:
        check_options(config)
        raise AskedError(config)

    monkeypatch.setattr(EngineConfig, "resolve", resolve)


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """`antiphon` with these words, in this process; errors are raised."""
    monkeypatch.setattr(sys, "argv", ["antiphon", *words])
    cli.app(standalone_mode=False)
