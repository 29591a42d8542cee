"""The command line: `antiphon generate`, `serve`, `eval`, `demo`, `doctor` and `bench`."""

from antiphon.cli.app import app, main

__all__ = ["app", "main"]
