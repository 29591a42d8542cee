"""Antiphon: Mixture-of-Experts inference with dual-batch overlap.

`LLM` and `SamplingParams` are the offline API; `antiphon.runtime` and `antiphon.comm` are a library of their own and
load nothing of the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antiphon.core.errors import AntiphonError, EngineError, ModelError, OptionError, RequestError
    from antiphon.core.sampling import CompletionOutput, GeneratedOutput, Logprob, SamplingParams
    from antiphon.frontend.llm import LLM

__all__ = [
    "LLM",
    "AntiphonError",
    "CompletionOutput",
    "EngineError",
    "GeneratedOutput",
    "Logprob",
    "ModelError",
    "OptionError",
    "RequestError",
    "SamplingParams",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "antiphon.frontend.llm",
    **dict.fromkeys(("CompletionOutput", "GeneratedOutput", "Logprob", "SamplingParams"), "antiphon.core.sampling"),
    **dict.fromkeys(
        ("AntiphonError", "EngineError", "ModelError", "OptionError", "RequestError"), "antiphon.core.errors"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'antiphon' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
