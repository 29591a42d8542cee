"""Converts the keyword arguments of `LLM` to the configuration of an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, ParamSpec

from antiphon.config.aliases import translate
from antiphon.config.engine_config import EngineConfig
from antiphon.config.options import OPTIONS, own_attention_backend, parse_option
from antiphon.core.options import options_of
from antiphon.core.policy import OverlapPolicy

logger = logging.getLogger("antiphon")

_Given = ParamSpec("_Given")

_FOREIGN_VARIABLE = "VLLM_ALL2ALL_BACKEND"
_FOREIGN_ATTENTION = "VLLM_ATTENTION_BACKEND"


def make_config(given: Mapping[str, Any]) -> EngineConfig:
    """Make a configuration from options, which may include those of other engines.

    Logs a warning for options without effect. Raises `OptionError` for an unknown, refused or contradictory option; its
    remedy names the nearest known option, or what to use instead.
    """
    options = {name: parse_option(name, given.get(name, one.default)) for name, one in OPTIONS.items()}
    meant = translate({name: value for name, value in given.items() if name not in OPTIONS}, OPTIONS)
    for name, value in (meant.unless_given | meant.own).items():
        if options[name] != OPTIONS[name].default:
            meant.check(name, options[name])
        else:
            options[name] = value
    notes = list(meant.notes)
    if os.environ.get(_FOREIGN_VARIABLE, "0") not in ("", "0"):
        setting = f"{_FOREIGN_VARIABLE}={os.environ[_FOREIGN_VARIABLE]}"
        notes.append(f"{setting} has no effect here; use transport='auto' or another of docs/options.md")
    options["attention_backend"] = _attention_backend(options["attention_backend"], notes)
    for note in notes:
        logger.warning(note)
    policy = OverlapPolicy(**{one.field: options.pop(name) for name, one in options_of(OverlapPolicy).items()})
    if isinstance(options["model"], Path):  # a local path, never the id of a model on the hub
        options["model"] = str(options["model"].expanduser().absolute())
    options["device"] = str(options["device"])
    options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    return EngineConfig(policy=policy, **options)


def _attention_backend(given: Any, notes: list[str]) -> Any:
    """Our name of the backend that was given, or that vLLM's variable asks for. A wrong one is left for the check."""
    asked = os.environ.get(_FOREIGN_ATTENTION, "")
    if given == "auto" and asked:
        own = own_attention_backend(asked)
        if own is not None:
            return own
        notes.append(f"{_FOREIGN_ATTENTION}={asked} has no effect here; use attention_backend='auto' or another")
    return own_attention_backend(given) or given


def shows_options(function: Callable[_Given, None]) -> Callable[_Given, None]:
    """Show every option in the signature and the help of a function that takes them as `**options`."""
    shown = signature(function)
    own = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=one.default, annotation=one.accepts)
        for name, one in OPTIONS.items()
    ]
    own[0] = own[0].replace(kind=Parameter.POSITIONAL_OR_KEYWORD)  # model
    first, *others = [parameter for name, parameter in shown.parameters.items() if name not in OPTIONS]
    function.__signature__ = shown.replace(parameters=[first, *own, *others])  # type: ignore[attr-defined]
    function.__doc__ = "".join(f"{name}: {one.help}\n" for name, one in OPTIONS.items())
    return function
