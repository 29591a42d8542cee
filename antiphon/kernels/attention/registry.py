"""The table of attention backends, and the choice of one.

backend, reason = choose_backend("auto", shape, dtype, block_size, device)
"""

from __future__ import annotations

from importlib import import_module

import torch

from antiphon.core.errors import OptionError
from antiphon.kernels.attention.base import AttentionBackend, AttentionShape

AUTO_ORDER = ("triton", "torch")
"""What `auto` tries, in this order; the last one takes everything."""

_CLASSES = {
    "triton": "triton_backend:TritonBackend",
    "cudnn": "cudnn:CudnnBackend",
    "flashinfer": "flashinfer:FlashInferBackend",
    "torch": "torch_backend:TorchBackend",
}

BACKEND_NAMES = tuple(_CLASSES)


def find_backend(name: str) -> type[AttentionBackend]:
    """The class of a backend; imports its module. `name` is one of `BACKEND_NAMES`."""
    module, class_name = _CLASSES[name].split(":")
    found: type[AttentionBackend] = getattr(import_module(f"antiphon.kernels.attention.{module}"), class_name)
    return found


def refusals(shape: AttentionShape, dtype: torch.dtype, block_size: int, device: torch.device) -> dict[str, str | None]:
    """Why each backend cannot be used; `None` for those that can."""
    return {name: find_backend(name).refusal(device, shape, dtype, block_size) for name in BACKEND_NAMES}


def choose_backend(
    name: str, shape: AttentionShape, dtype: torch.dtype, block_size: int, device: torch.device
) -> tuple[AttentionBackend, str]:
    """The backend with this name, or with "auto" the first of `AUTO_ORDER` that can be used; and the reason.

    Raises `OptionError` if the named backend cannot be used.
    """
    reasons: list[str] = []
    for candidate in AUTO_ORDER if name == "auto" else (name,):
        kind = find_backend(candidate)
        refusal = kind.refusal(device, shape, dtype, block_size)
        if refusal is None:
            passed_over = [f"not {other}: {why}" for other, why in zip(AUTO_ORDER, reasons, strict=False)]
            reason = "as requested" if name != "auto" else "; ".join(passed_over) or "the first choice on CUDA devices"
            return kind(shape, dtype, block_size, device), reason
        reasons.append(refusal)
    usable = [other for other, why_not in refusals(shape, dtype, block_size, device).items() if why_not is None]
    raise OptionError(
        f"attention_backend={name!r} cannot be used",
        limit=reasons[-1],
        remedy=f"use auto, {', '.join(usable[:-1])} or {usable[-1]}" if usable[1:] else f"use auto or {usable[0]}",
        option="attention_backend",
        value=name,
    )
