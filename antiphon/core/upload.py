"""Small tensors of the host brought to a device together: one copy, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies of CPU tensors, all of one dtype, on `device`, in order: views of one new buffer there.

    On a GPU the copy goes through pinned memory on the stream that is current, and the results are safe on that
    stream. The sources may be changed as soon as the call has returned.
    """
    sizes = [tensor.numel() for tensor in tensors]
    packed = torch.empty(sum(sizes), dtype=tensors[0].dtype, device="cpu", pin_memory=device.type == "cuda")
    torch.cat([tensor.reshape(-1) for tensor in tensors], out=packed)
    # torch's allocator of pinned memory keeps the buffer until the copy is done.
    moved = packed.to(device, non_blocking=True)
    return [part.view(tensor.shape) for part, tensor in zip(torch.split(moved, sizes), tensors, strict=True)]
