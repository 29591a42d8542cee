"""What is said where a kernel takes a slower path than the device could."""

from __future__ import annotations

import torch

from antiphon.core.warn_once import warn_once

LAUNCH_COST = "a launch takes 16 to 45 us of the host instead of 6, so eager steps are host-bound sooner"
"""The cost of a launch through Triton's own call (docs/facts.md)."""

LAUNCH_REMEDY = "use torch 2.11 to 2.14 with the Triton that it brings"


def warn_of_reference(function: str, *tensors: torch.Tensor) -> None:
    """On a GPU: plain torch is used in place of a kernel that wants one dtype for all of these tensors."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    warn_once(
        f"{function} runs in plain torch on a GPU, because its tensors are {' and '.join(dtypes)}",
        cost="several launches and passes over memory instead of one",
        remedy="give all of them one dtype",
    )
