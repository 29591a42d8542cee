"""The sum of the partial sums of all ranks, in order of rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def add_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors of one shape and dtype, in their order, in float32 at least, rounded once; new."""
    if len(parts) == 1:
        return parts[0].clone()
    if len(parts) == 2:  # an addition of two is computed wide and rounded once on every device
        return torch.add(*parts)
    wide = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32), copy=True)
    for part in parts[1:]:
        wide += part
    return wide.to(parts[0].dtype)
