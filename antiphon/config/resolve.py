"""Resolves single options whose value depends on other options, the machine or the environment."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from antiphon.comm import peers_forbidden
from antiphon.core.bundled import BUNDLED_MODEL, bundled_model
from antiphon.core.errors import OptionError, unknown_value
from antiphon.core.policy import DBO_MODES, OverlapPolicy
from antiphon.core.warn_once import warn_once
from antiphon.device.table import find_device, num_devices
from antiphon.machine.probe import nvidia_gpus
from antiphon.models import PRESETS, RoutingSpec, parse_routing, resolve_model

logger = logging.getLogger("antiphon.engine")

DEVICE_VARIABLE = "ANTIPHON_DEVICE"
"""The environment variable that overrides `device="auto"`."""

DBO_VARIABLE = "ANTIPHON_DBO"
"""The environment variable that overrides `dbo="auto"`."""

ASCEND_DBO_VARIABLE = "VLLM_ASCEND_ENABLE_DBO"
"""vLLM-Ascend's variable: 1 acts as `ANTIPHON_DBO=on` if that is not set; 0, its default, has no effect."""

_DBO_WORDS: dict[str, str | None] = {**{mode: mode for mode in DBO_MODES}, "1": "on", "0": "off"}
_ASCEND_DBO_WORDS: dict[str, str | None] = {"1": "on", "0": None}


def resolve_dbo(policy: OverlapPolicy) -> tuple[OverlapPolicy, str]:
    """Apply the environment to `dbo="auto"`; also returns the setting that decided, such as "ANTIPHON_DBO=1", or "".

    Raises `OptionError` for an unknown setting.
    """
    settings = _dbo_settings()
    if policy.dbo != "auto" or not settings:
        return policy, ""
    setting, dbo = settings[0]
    return replace(policy, dbo=dbo), setting


def overruled_dbo(policy: OverlapPolicy, source: str) -> list[str]:
    """A sentence for each environment setting that disagrees with the `dbo` that `resolve_dbo` returned."""
    return [
        f"{setting} has no effect: {source or 'the option'} takes precedence with dbo={policy.dbo!r}"
        for setting, dbo in _dbo_settings()
        if dbo != policy.dbo
    ]


def _dbo_settings() -> list[tuple[str, str]]:
    """(setting, its value of `dbo`) for each variable of the environment; the first one wins."""
    found = []
    for variable, words in ((DBO_VARIABLE, _DBO_WORDS), (ASCEND_DBO_VARIABLE, _ASCEND_DBO_WORDS)):
        asked = os.environ.get(variable)
        if not asked:
            continue
        if asked not in words:
            raise unknown_value(variable, asked, words)
        if (dbo := words[asked]) is not None:
            found.append((f"{variable}={asked}", dbo))
    return found


def check_layers(policy: OverlapPolicy, num_layers: int) -> None:
    """Raises `OptionError` if the layers to split are not layers of the model."""
    for name, value, most in (
        ("dbo_start_layer", policy.start_layer, num_layers - 1),
        ("dbo_end_layer", policy.end_layer or 0, num_layers),
    ):
        if value > most:
            raise OptionError(
                f"{name}={value} is beyond the model's {num_layers} layers",
                remedy=f"use at most {most}",
                option=name,
                value=value,
            )


def resolve_device(device: str, ranks: int) -> tuple[str, str]:
    """Resolve the kind of device; also returns the reason. Warns if `auto` leaves GPUs idle.

    Raises `OptionError` for an unknown kind, and for more ranks than devices of that kind.
    """
    name, where = device, "device"
    if device == "auto" and os.environ.get(DEVICE_VARIABLE):
        name, where = os.environ[DEVICE_VARIABLE], DEVICE_VARIABLE
    if name == "auto":
        found = num_devices("cuda")
        if found < ranks:
            _warn_of_idle_gpus(found, ranks)
        return "cuda" if found >= ranks else "cpu", f"CUDA devices: {found}, ranks: {ranks}"
    owner = find_device(name, option=where)
    if not owner.own_memory:  # all ranks share the host
        return name, f"by {where}"
    found = num_devices(name)
    if found >= ranks:
        return name, f"devices: {found}, ranks: {ranks}"
    checked = "CUDA_VISIBLE_DEVICES and torch's build" if owner.peer_access else "torch's build and its plug-in"
    raise OptionError(
        f"{where}={name!r} needs one device per rank",
        limit=f"ranks={ranks}, and {found} are usable here",
        remedy=f"use fewer ranks or device='cpu', or check the driver, {checked}",
        option=where,
        value=name,
    )


def _warn_of_idle_gpus(found: int, ranks: int) -> None:
    """found: CUDA devices that can be used, fewer than the ranks."""
    if found:
        reason = f"{ranks} ranks need one CUDA device each, and only {found} can be used"
        remedy = f"use {found} rank{'s' if found > 1 else ''}"
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not (idle := nvidia_gpus()):
        return  # they are hidden on purpose, or there are none
    elif torch.version.cuda is None:
        gpus = f"{idle} NVIDIA GPU{'s' if idle > 1 else ''}"
        reason = f"torch {torch.__version__} is built without CUDA, and the machine has {gpus}"
        remedy = "install torch's CUDA build"
    else:
        reason = f"torch cannot use any of the machine's {idle} NVIDIA GPU(s)"
        remedy = "check the driver (antiphon doctor; in a container --gpus all)"
    warn_once(
        f"device='auto' chose CPUs because {reason}",
        cost="steps are slower by orders of magnitude",
        remedy=f"{remedy}, or set device='cpu'",
    )


def resolve_peer_access(peer_access: bool) -> bool:
    """Whether peer access is allowed by the option and, through `NCCL_P2P_DISABLE`, by the environment."""
    return peer_access and not peers_forbidden(os.environ)


def resolve_source(model: str, load_format: str, *, revision: str | None = None) -> Path | str:
    """Find the folder of a checkpoint, or the name of a preset. Downloads missing files of a model on the hub.

    Raises `OptionError` for a preset without dummy weights, `ModelError` for a model that cannot be found.
    """
    if model == BUNDLED_MODEL:
        if revision is not None:
            logger.warning("revision=%r has no effect: %s is bundled", revision, model)
        return bundled_model()
    if model not in PRESETS or Path(model).is_dir():
        return resolve_model(model, revision=revision, weights=load_format != "dummy")
    if load_format != "dummy":
        raise OptionError(
            f"model {model!r} is a shape without weights",
            remedy="load it with dummy weights (load_format='dummy', --load-format dummy), or pass the folder of its "
            "checkpoint",
            option="model",
            value=model,
        )
    return model


def resolve_routing(routing: str, load_format: str) -> RoutingSpec:
    """Parse the routing. Raises `OptionError` for an unknown one, and for one that would replace a trained router."""
    spec = parse_routing(routing)
    if str(spec) != "model" and load_format != "dummy":
        raise OptionError(
            f"routing={routing!r} requires dummy weights",
            remedy="add load_format='dummy'",
            option="routing",
            value=routing,
        )
    return spec
