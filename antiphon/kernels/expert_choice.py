"""Which kernels compute the experts of a batch: those for few rows, or grouped products.

Up to some number of rows the time is that of reading the weights, and the kernels of
`antiphon.kernels.fused.small_experts` read them at nearly full bandwidth; for large batches torch's grouped products
win. Where they cross depends on the GPU and on the model's shape, so `tune_experts` measures it at the start of an
engine. The choice is by the number of rows alone, padding and rows without local experts included: how many
pairs are local is known on the device only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

DEFAULT_SMALL_ROWS = 512
"""The largest number of rows for the kernels for few rows until the choice is tuned."""

GROUPED_KERNELS = (9, 10)
"""The major compute capabilities for which torch up to 2.14 has a grouped GEMM."""

_ALIGNMENT_BYTES = 16  # torch's grouped GEMM requires it for strides
_LEAST_MAJOR = 8  # below it there are no tensor cores for bfloat16
_UNLIMITED = 1 << 62
_MARGIN = 1.03  # grouped products must be faster by more than repeated measurements differ
_FLOAT32_ROWS = 4096  # captured steps have fewer; larger batches take longer here than expert by expert


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one layer's experts for a number of rows, by either kind of kernel."""

    num_rows: int
    small_us: float
    grouped_us: float


@dataclass(slots=True)
class ExpertChoice:
    """The choice for all layers that share an `ExpertWorkspace`."""

    small_rows: int = DEFAULT_SMALL_ROWS
    timings: tuple[Timing, ...] = ()
    _limits: dict[tuple[object, ...], int] = field(default_factory=dict)

    def takes_small(self, x_RD: torch.Tensor, width: int) -> bool:
        """Whether the kernels for few rows compute these rows. width: of an expert."""
        return x_RD.shape[0] <= self.limit(x_RD, width)

    def limit(self, x_RD: torch.Tensor, width: int) -> int:
        """The largest number of rows like these that the kernels for few rows compute; 0 where they cannot run."""
        key = (x_RD.dtype, x_RD.device, x_RD.shape[1], width)
        limit = self._limits.get(key)
        if limit is None:
            limit = self._limits[key] = self._limit(x_RD, width)
        return limit

    def _limit(self, x_RD: torch.Tensor, width: int) -> int:
        """The largest number of rows; 0 where the kernels for few rows cannot run."""
        if not x_RD.is_cuda or x_RD.dtype == torch.float64 or major_capability(x_RD.device) < _LEAST_MAJOR:
            return 0
        if x_RD.dtype == torch.float32:
            return max(self.small_rows, _FLOAT32_ROWS)
        if not runs_in_a_loop(x_RD.dtype, (x_RD.shape[1], width), x_RD.device):
            return self.small_rows
        # The alternative runs expert by expert while the host waits for the device in every layer.
        return _UNLIMITED

    def resolve(self, timings: tuple[Timing, ...]) -> None:
        """Take the kernels for few rows up to the last measured number, from the smallest on, at which they win."""
        self.timings = tuple(sorted(timings, key=lambda timing: timing.num_rows))
        small_rows = 0
        for timing in self.timings:
            if timing.small_us > timing.grouped_us * _MARGIN:
                break
            small_rows = timing.num_rows
        self.set_small_rows(small_rows)

    def set_small_rows(self, small_rows: int) -> None:
        """Take the kernels for few rows up to this number, wherever both kinds can run without waiting."""
        self.small_rows = small_rows
        self._limits.clear()

    def agree(self, small_rows_by_rank: Sequence[int]) -> None:
        """Take the smallest number of all ranks, so that every rank rounds alike."""
        self.set_small_rows(min(small_rows_by_rank))

    def describe(self) -> str:
        """One line for the start of an engine."""
        how = "measured" if self.timings else "not measured"
        line = f"kernels for few rows compute the experts of up to {self.small_rows} rows ({how})"
        nearest = [timing for timing in self.timings if timing.num_rows >= self.small_rows][:2]
        parts = [f"{t.num_rows} rows: {t.small_us:.0f} us, grouped products {t.grouped_us:.0f}" for t in nearest]
        return "; ".join([line, *parts])


def capture_obstacle(weight: torch.Tensor) -> str:
    """Why experts whose weights are like this one cannot be captured in a CUDA graph; "" if they can.

    Captured steps are small. The kernels for few rows compute them, or grouped products that do not wait.
    """
    if weight.dtype == torch.float64:
        return "experts run one by one in float64, and the host waits for the device"
    if weight.is_cuda and major_capability(weight.device) < _LEAST_MAJOR:
        return f"expert kernels need compute capability {_LEAST_MAJOR}.0, and it is {major_capability(weight.device)}.x"
    return ""


def runs_in_a_loop(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> bool:
    """Whether grouped products on a CUDA device run expert by expert, in torch or here.

    sizes: what the rows of the products and of their results consist of, in numbers.
    """
    return dtype != torch.bfloat16 or is_unaligned(dtype, sizes) or major_capability(device) not in GROUPED_KERNELS


def is_unaligned(dtype: torch.dtype, sizes: tuple[int, ...]) -> bool:
    """Whether rows of these sizes are no multiples of what torch's grouped GEMM requires."""
    return any(size * dtype.itemsize % _ALIGNMENT_BYTES for size in sizes)


@lru_cache(maxsize=64)
def major_capability(device: torch.device) -> int:
    """The major compute capability of a CUDA device."""
    return int(torch.cuda.get_device_capability(device)[0])
