"""From the keyword arguments of `LLM` to the configuration of an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from antiphon.config.aliases import translate
from antiphon.config.engine_config import EngineConfig
from antiphon.config.option_sizes import as_number
from antiphon.core.policy import OPTION_NAMES, OverlapPolicy

logger = logging.getLogger("antiphon")

_FOREIGN_VARIABLES = {
    "VLLM_ALL2ALL_BACKEND": "use transport='auto' or another of docs/options.md",
}

_POLICY_FIELDS = {option: field for field, option in OPTION_NAMES.items()}

OPTION_DEFAULTS: Mapping[str, Any] = {
    **{field.name: field.default for field in fields(EngineConfig) if field.default is not MISSING},
    **{OPTION_NAMES[field.name]: field.default for field in fields(OverlapPolicy)},
}
"""Every option of an engine by the name that users know, and its default."""


def make_config(own: Mapping[str, Any], foreign: Mapping[str, Any]) -> EngineConfig:
    """The configuration that the options ask for; `foreign` are those that are not ours.

    Warns of what has no effect. Raises `OptionError` for an option that is not known, is refused, or contradicts
    another one; the nearest known name, or what to use instead, is in the message.
    """
    options = {name: as_number(name, value) for name, value in own.items()}
    meant = translate(foreign, OPTION_DEFAULTS)
    for name, value in (meant.unless_given | meant.own).items():
        if options[name] != OPTION_DEFAULTS[name]:
            meant.check(name, options[name])
        else:
            options[name] = value
    notes = list(meant.notes)
    for variable, remedy in _FOREIGN_VARIABLES.items():
        if os.environ.get(variable, "0") not in ("", "0"):
            notes.append(f"{variable}={os.environ[variable]} is not obeyed here; {remedy}")
    for note in notes:
        logger.warning(note)
    policy = OverlapPolicy(**{field: options.pop(option) for option, field in _POLICY_FIELDS.items()})
    if isinstance(options["model"], Path):  # never the id of a model on the hub
        options["model"] = str(options["model"].expanduser().absolute())
    options["device"] = str(options["device"])
    options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    return EngineConfig(policy=policy, **options)
