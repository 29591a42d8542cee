"""What tests of kernels compute on: random tensors, rows with gaps between them, and how far results are apart."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU they are interpreted: see conftest
NAN = float("nan")


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def padded(x: torch.Tensor, gap: int, filling: float = NAN) -> torch.Tensor:
    """The same values as a view of rows that are `gap` longer."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + gap), filling)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def make_ids(num_rows: int, top_k: int, num_ids: int, *, seed: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Different ids in each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_rows, num_ids, generator=generator).argsort(1)[:, :top_k].to(dtype).to(DEVICE)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
