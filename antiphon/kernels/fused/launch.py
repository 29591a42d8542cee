"""Kernel launches that take little host time, and the choices of size that all kernels share.

Triton's own launch binds arguments, derives their specialization, builds a key from it and asks the driver about every
pointer: 16 to 45 us on a slow host. A `Launch` is one kernel for one shape, with everything but the tensors fixed. It
launches through Triton once, keeps the compiled kernel that this returns, and then calls its launcher itself
(`direct`).

    @lru_cache(maxsize=NUM_SHAPES)
    def _copy(num_rows: int, size: int) -> Launch:
        return Launch(_copy_kernel, (num_rows, 1), integers=(num_rows,), constants={"D": size})

    _copy(*x_TD.shape)(x_TD, out_TD)

Because integers and constants are fixed, Triton's specialization depends only on the dtypes of the tensors, on which
pointers are multiples of 16 bytes, and on the device. These form our key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from antiphon.kernels.fused.direct import Direct, Driver, find_driver

NUM_SHAPES = 1024
"""Maximum number of launches kept per kernel."""

_POINTER_ALIGNMENT = 16
_MAX_COLUMN_BLOCK = 1024
_LARGEST_UNIT = 16


class Launch:
    """A kernel with its grid, integers and constants; a call adds the tensors and queues it on the current stream.

    The kernel's parameters are pointers, then integers, then constants. All tensors must be on the current device;
    Triton checks this in the first call only. Where `find_driver` finds no driver, or the driver refuses the kernel,
    every call goes through Triton.
    """

    __slots__ = ("_constants", "_direct", "_driver", "_grid", "_integers", "_kernel", "_num_warps", "_tail")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        *,
        integers: tuple[int, ...] = (),
        constants: Mapping[str, Any],
        num_warps: int = 4,
        driver: Driver | None = None,
    ) -> None:
        """driver: replaces the one from `find_driver`, for tests."""
        self._kernel = kernel
        self._grid = grid
        self._integers = integers
        self._constants = constants
        self._num_warps = num_warps
        self._driver = find_driver() if driver is None else driver
        self._tail = (*integers, *constants.values())  # launchers skip constants, so their order does not matter
        self._direct: dict[tuple[Any, ...], Direct | None] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        driver = self._driver
        if driver is None or driver.hooked():
            self._through_triton(tensors)
            return
        device = driver.device()
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = (device, _misaligned(pointers), *[tensor.dtype for tensor in tensors])
        direct = self._direct.get(key)
        if direct is None:
            compiled = self._through_triton(tensors)
            if key not in self._direct:
                self._direct[key] = driver.direct(compiled)
            return
        direct.queue(self._grid, driver.stream(device), (*pointers, *self._tail))

    def _through_triton(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        return self._kernel[self._grid](*tensors, *self._integers, **self._constants, num_warps=self._num_warps)


def _misaligned(pointers: list[int]) -> int:
    """A bit mask of the pointers that are not multiples of 16."""
    together = 0
    for pointer in pointers:
        together |= pointer
    if together % _POINTER_ALIGNMENT == 0:
        return 0
    return sum(1 << i for i, pointer in enumerate(pointers) if pointer % _POINTER_ALIGNMENT)


def divide_up(number: int, by: int) -> int:
    return -(-number // by)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def column_block(size: int) -> int:
    """The number of columns per program, a power of two."""
    return min(_MAX_COLUMN_BLOCK, power_of_two(size))


def stride_unit(stride: int) -> int:
    """The largest power of two up to 16 that divides the stride.

    Triton only checks whether an integer is a multiple of 16. Rows of a slab are multiples of 16 bytes, which are 8
    bfloat16 numbers; passing the stride in constant units of 8 keeps the loads 16 bytes wide.
    """
    return math.gcd(stride, _LARGEST_UNIT)


def is_double(dtype: torch.dtype) -> bool:
    """Whether sums of `dtype` are computed in float64 rather than in float32."""
    return dtype == torch.float64
