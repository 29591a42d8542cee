"""One CUDA device: the CUDA side of `runtime.device`, and the only file of the runtime that asks for its memory."""

from __future__ import annotations

import torch


def num_devices() -> int:
    """0 without a driver or with a CPU build of torch."""
    return int(torch.cuda.device_count())


def activate(device: torch.device) -> None:
    """Set the current device. TF32 would cost float32 its last 13 bits of every factor, routers included."""
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")


def synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes, as the driver counts them: other processes and other libraries included."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return int(free_bytes), int(total_bytes)


def release_unused(device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    release_unused(device)
    torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Reserved, not allocated memory is counted: what the allocator could not reuse would be missing again."""
    torch.cuda.synchronize(device)
    free_bytes, total_bytes = memory(device)
    outside = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
    return int(outside + torch.cuda.max_memory_reserved(device))


def describe(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device))
