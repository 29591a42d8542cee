"""`silu(gate) * up` in one pass."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, divide_up, is_double, power_of_two

_ELEMENTS_PER_TILE = 2048
_MAX_COLUMNS = 256
_MAX_PROGRAMS = 1056  # eight per SM of an H100; each takes tile after tile


@triton.jit(do_not_specialize=["num_rows"])
def _gated_silu_kernel(
    gate_up_XG,
    out_XF,
    ends_E,
    num_rows,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if E > 0:
        num_rows = tl.minimum(num_rows, tl.load(ends_E + E - 1))
    COLUMN_TILES: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    num_tiles = tl.cdiv(num_rows, BLOCK_X) * COLUMN_TILES
    tile = tl.program_id(0)
    while tile < num_tiles:
        rows = (tile // COLUMN_TILES) * BLOCK_X + tl.arange(0, BLOCK_X)
        columns = (tile % COLUMN_TILES) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = (rows < num_rows)[:, None] & (columns < F)[None, :]
        rows = rows.to(tl.int64)
        source = gate_up_XG + rows[:, None] * (2 * F) + columns[None, :]
        gate = tl.load(source, mask=mask, other=0).to(WIDE)
        up = tl.load(source + F, mask=mask, other=0).to(WIDE)
        act = gate / (1 + tl.exp(-gate)) * up
        tl.store(out_XF + rows[:, None] * F + columns[None, :], act.to(out_XF.dtype.element_ty), mask=mask)
        tile += tl.num_programs(0)


@lru_cache(maxsize=NUM_SHAPES)
def _gated_silu(num_rows: int, width: int, num_ends: int, double: bool) -> Launch:
    block_f = min(_MAX_COLUMNS, power_of_two(width))
    block_x = _ELEMENTS_PER_TILE // block_f
    num_tiles = divide_up(num_rows, block_x) * divide_up(width, block_f)
    return Launch(
        _gated_silu_kernel,
        (min(num_tiles, _MAX_PROGRAMS), 1),
        integers=(num_rows,),
        constants={"E": num_ends, "F": width, "BLOCK_X": block_x, "BLOCK_F": block_f, "DOUBLE": double},
    )


def launch_gated_silu(gate_up_XG: torch.Tensor, out_XF: torch.Tensor, ends_E: torch.Tensor | None) -> None:
    """Fill the first `ends_E[-1]` rows of `out_XF`, or all of them if there are no ends. Both are contiguous."""
    num_rows, width = out_XF.shape
    launch = _gated_silu(num_rows, width, 0 if ends_E is None else ends_E.shape[0], is_double(out_XF.dtype))
    launch(gate_up_XG, out_XF, out_XF if ends_E is None else ends_E)


def gated_silu_fused(gate_up_XG: torch.Tensor) -> torch.Tensor:
    """See `gated_silu`."""
    gate_up_XG = gate_up_XG.contiguous()
    out_XF = gate_up_XG.new_empty(gate_up_XG.shape[0], gate_up_XG.shape[1] // 2)
    if out_XF.numel():
        launch_gated_silu(gate_up_XG, out_XF, None)
    return out_XF
