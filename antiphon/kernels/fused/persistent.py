"""Launches of kernels whose programs share the work: as many programs as a device holds at a time.

One program too many per SM waits for a place and then works alone, which costs 5 to 14 %; one too few leaves bandwidth
unused. How many fit depends on the registers and the shared memory that the compiler chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.knobs

from antiphon.kernels.fused.direct import Driver
from antiphon.kernels.fused.launch import Launch

_INTERPRETED_PROGRAMS = 3  # few enough for each to take several tiles in tests
_WARP = 32
_REGISTER_UNIT = 8  # registers per thread are given out in multiples of this
_RESERVED_BYTES = 1024  # of shared memory for each program
_MAX_PROGRAMS = 32  # per SM, on every architecture since 2014 but some small ones with 16 or 24


class PersistentLaunch(Launch):
    """A `Launch` whose grid is found at its first call: all programs that are resident at a time on that device."""

    __slots__ = ()

    def __init__(
        self,
        kernel: Any,
        *,
        integers: tuple[int, ...] = (),
        constants: Mapping[str, Any],
        num_warps: int = 4,
        driver: Driver | None = None,
    ) -> None:
        super().__init__(kernel, (0, 1), integers=integers, constants=constants, num_warps=num_warps, driver=driver)

    def __call__(self, *tensors: torch.Tensor) -> None:
        if self._grid[0] == 0:
            self._grid = (self._count_programs(tensors), 1)
        super().__call__(*tensors)

    def _count_programs(self, tensors: tuple[torch.Tensor, ...]) -> int:
        if triton.knobs.runtime.interpret:
            return _INTERPRETED_PROGRAMS
        compiled = self._kernel.warmup(
            *tensors, *self._integers, **self._constants, num_warps=self._num_warps, grid=(1,)
        )
        _ = compiled.run  # loads the kernel, which tells its registers
        device = torch.cuda.get_device_properties(tensors[0].device)
        per_sm = resident_programs(compiled.n_regs, compiled.metadata.shared, self._num_warps, device)
        return per_sm * int(device.multi_processor_count)


def resident_programs(num_registers: int, shared_bytes: int, num_warps: int, device: Any) -> int:
    """Programs that fit on an SM of the device; at least 1.

    num_registers: of a thread. shared_bytes: of a program. device: its properties, as torch gives them.
    """
    registers = -(-num_registers // _REGISTER_UNIT) * _REGISTER_UNIT * _WARP * num_warps
    return max(
        1,
        min(
            device.shared_memory_per_multiprocessor // (shared_bytes + _RESERVED_BYTES),
            device.regs_per_multiprocessor // max(1, registers),
            device.max_threads_per_multi_processor // (_WARP * num_warps),
            _MAX_PROGRAMS,
        ),
    )
