"""What backends of other libraries ask for alike: a CUDA device, a package, and block tables without loose ends."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from antiphon.kernels.dispatch import cuda_kernels_allowed

HALVES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


def device_refusal(device: torch.device, module: str, package: str) -> str | None:
    """Why no kernel of the module can run on the device; `None` if one can. package: what to install for it."""
    if device.type != "cuda":
        return f"it needs a CUDA device, and the device is {device.type}"
    if not cuda_kernels_allowed():
        return "kernels for CUDA devices are switched off for this device"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "it needs compute capability 8.0 or later"
    if find_spec(module) is None:
        return f"the package {package} is not installed"
    return None


def dtype_refusal(dtype: torch.dtype) -> str | None:
    if dtype in HALVES:
        return None
    return f"it computes in bfloat16 or float16, and the dtype is {str(dtype).removeprefix('torch.')}"


def block_refusal(block_size: int, least: int) -> str | None:
    if block_size >= least and block_size & (block_size - 1) == 0:
        return None
    return f"it needs a block_size that is a power of two from {least} on, and it is {block_size}"


def without_loose_ends(
    block_table_NB: torch.Tensor, seq_lens_N: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For libraries that read a whole table and take no text of length 0.

    Returns lengths of at least 1, the table with block 0 in all columns past a text, and the rows of length 0 [N],
    whose results are to be replaced by zeros.
    """
    starts_B = torch.arange(block_table_NB.shape[1], device=seq_lens_N.device, dtype=torch.int32) * block_size
    table_NB = block_table_NB.masked_fill(starts_B >= seq_lens_N.unsqueeze(1), 0)
    return seq_lens_N.clamp_min(1), table_NB, seq_lens_N == 0
