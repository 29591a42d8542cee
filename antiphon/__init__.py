"""Antiphon: Mixture-of-Experts inference with dual-batch overlap.

`LLM` and `SamplingParams` are the offline API; `AsyncEngine` is its asynchronous form. `antiphon.runtime` and
`antiphon.comm` form a library of their own that does not load the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antiphon.core.errors import AntiphonError, EngineError, ModelError, OptionError, RequestError
    from antiphon.core.sampling import CompletionOutput, GeneratedOutput, Logprob, RequestOutput, SamplingParams
    from antiphon.frontend.async_engine import AsyncEngine
    from antiphon.frontend.llm import LLM
    from antiphon.frontend.stats import EngineStats

__all__ = [
    "LLM",
    "AntiphonError",
    "AsyncEngine",
    "CompletionOutput",
    "EngineError",
    "EngineStats",
    "GeneratedOutput",
    "Logprob",
    "ModelError",
    "OptionError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "antiphon.frontend.llm",
    "AsyncEngine": "antiphon.frontend.async_engine",
    "EngineStats": "antiphon.frontend.stats",
    **dict.fromkeys(
        ("CompletionOutput", "GeneratedOutput", "Logprob", "RequestOutput", "SamplingParams"), "antiphon.core.sampling"
    ),
    **dict.fromkeys(
        ("AntiphonError", "EngineError", "ModelError", "OptionError", "RequestError"), "antiphon.core.errors"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'antiphon' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
