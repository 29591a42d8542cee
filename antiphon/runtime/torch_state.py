"""PyTorch's thread-wide settings, which a lane must leave as it found them.

Grad mode, inference mode, autocast, the default dtype and device belong to the host thread, not to a lane: a lane that
enters `torch.no_grad()` and switches inside it changes them for the other lanes. Set them once, outside `run_lanes`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TorchState(NamedTuple):
    """A snapshot of the thread-wide settings."""

    grad_mode: bool
    inference_mode: bool
    autocast: tuple[torch.dtype | None, ...]  # None where it is off
    default_dtype: torch.dtype
    function_modes: int  # such as a default device
    dispatch_modes: int

    @staticmethod
    def read(device_types: tuple[str, ...]) -> TorchState:
        return TorchState(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
                for device_type in device_types
            ),
            torch.get_default_dtype(),
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        )

    def changes(self, now: TorchState) -> str:
        """What differs between this snapshot and a later one, in words; empty if nothing does."""
        return ", ".join(
            f"{name.replace('_', ' ')} {before} -> {after}"
            for name, before, after in zip(self._fields, self, now, strict=True)
            if before != after
        )
