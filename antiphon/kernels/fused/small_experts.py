"""The experts of one rank for few rows, in four launches that any GPU from compute capability 8.0 on can capture.

    place      one program for each expert finds the pairs that it computes, in order of row
    up         gathers rows while loading, multiplies by gate and up, applies the gated silu
    down       multiplies by down; the result of a pair goes to the pair's place
    add up     computes each row's weighted sum over its places, in order of slot, in float32

With few rows per expert, the time is that of reading the weights. Tiles of tensor cores are at least 64 high, and an
expert has a handful of rows, so weights are the rows of the products and tokens their columns: a tile of 16 tokens
wastes little. `up` and `down` are persistent; tiles are found on the device from the ends of the experts, so padding
and the experts of other ranks cost nothing.

**Same bits**: what a pair contributes depends neither on the other rows nor on their number. Sums over D and F go in
the same order and in the same steps for every size of tile, and so does the sum over the slots of a row. This holds
within these kernels, for one device and dtype; the grouped products that large batches take round differently.

Shapes: as in `grouped_experts`. Tiles are M outputs high, N tokens wide and K numbers deep.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.launch import NUM_SHAPES, Launch, power_of_two, stride_unit
from antiphon.kernels.fused.persistent import PersistentLaunch
from antiphon.kernels.grouped_experts import ExpertWorkspace

SMALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_MIN_IDS, _MAX_IDS = 128, 2048  # that a program reads at a time while placing
_NUM_WARPS = 4
_LARGE_SHARED_BYTES = 160 << 10  # per program; compute capabilities 8.0, 9.0 and 10.0 have them, 8.6, 8.9 and 12.0 not


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of the tiles of one product, named as the kernels' constants."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    STAGES: int


# ---- the place of each pair


@triton.jit
def _load_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K: tl.constexpr):
    """The expert of each pair, counted from this rank's first; -1 past the last pair."""
    offsets = (pairs // K).to(tl.int64) * stride_row + (pairs % K) * stride_slot
    inside = pairs < num_pairs
    return tl.where(inside, tl.load(ids + offsets, mask=inside, other=-1) - first_expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "first_expert"])
def _place_kernel(
    ids,
    places_RK,
    rows_X,
    ends_E,
    num_pairs,
    stride_row,
    stride_slot,
    first_expert,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    start = num_pairs * 0
    while start < num_pairs:
        pairs = start + lanes
        number = _load_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K)
        lower += ((number >= 0) & (number < expert)).to(tl.int32)
        if expert == 0:
            elsewhere = (number < 0) | (number >= E)
            tl.store(places_RK + pairs, tl.zeros([BLOCK], tl.int32) - 1, mask=elsewhere & (pairs < num_pairs))
        start += BLOCK
    end = tl.sum(lower, 0)
    start = num_pairs * 0
    while start < num_pairs:
        pairs = start + lanes
        number = _load_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K)
        mine = (number == expert).to(tl.int32)
        places = end + tl.cumsum(mine, 0) - 1
        tl.store(places_RK + pairs, places, mask=mine > 0)
        tl.store(rows_X + places, pairs // K, mask=mine > 0)
        end += tl.sum(mine, 0)
        start += BLOCK
    tl.store(ends_E + expert, end)


@lru_cache(maxsize=NUM_SHAPES)
def _place(num_rows: int, top_k: int, strides: tuple[int, int], num_experts: int, first_expert: int) -> Launch:
    num_pairs = num_rows * top_k
    return Launch(
        _place_kernel,
        (num_experts, 1),
        integers=(num_pairs, *strides, first_expert),
        constants={"K": top_k, "E": num_experts, "BLOCK": min(_MAX_IDS, max(_MIN_IDS, power_of_two(num_pairs)))},
    )


def place_few(
    ids_RK: torch.Tensor, num_experts: int, workspace: ExpertWorkspace, *, first_expert: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `place_pairs`, in one launch: places [R, K] and ends [E]; and between them the row [X] of each place."""
    num_rows, top_k = ids_RK.shape
    device = ids_RK.device
    places_RK = workspace.get("places", (num_rows, top_k), torch.int32, device)
    rows_X = workspace.get("rows", (num_rows * top_k,), torch.int32, device)
    ends_E = workspace.get("ends", (num_experts,), torch.int32, device)
    launch = _place(num_rows, top_k, ids_RK.stride(), num_experts, first_expert)
    launch(ids_RK, places_RK, rows_X, ends_E)
    return places_RK, rows_X, ends_E


# ---- products


@triton.jit
def _last_tiles(ends_E, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, ROW_TILES: tl.constexpr):
    """The number of tiles of each expert and all before it."""
    experts_E = tl.arange(0, BLOCK_E)
    end_E = tl.load(ends_E + experts_E, mask=experts_E < E, other=0)
    begin_E = tl.load(ends_E + experts_E - 1, mask=(experts_E > 0) & (experts_E < E), other=0)
    return tl.cumsum((end_E - begin_E + BLOCK_N - 1) // BLOCK_N * ROW_TILES, 0)


@triton.jit
def _find_tile(tile, last_tiles_E, ends_E, BLOCK_N: tl.constexpr):
    """The expert of a tile, its tile of outputs, its first place, and where the expert's places end.

    Tiles that read the same weights follow each other, so they run at the same time and share them in L2.
    """
    before_E = last_tiles_E <= tile
    expert = tl.sum(before_E.to(tl.int32), 0)
    inside = tile - tl.max(tl.where(before_E, last_tiles_E, 0), 0)
    begin = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_E + expert)
    token_tiles = (end - begin + BLOCK_N - 1) // BLOCK_N
    return expert, inside // token_tiles, begin + inside % token_tiles * BLOCK_N, end


@triton.jit
def _load_weights(weight_rows, columns, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    if SIZE % BLOCK_K == 0:
        return tl.load(weight_rows[:, None] + columns[None, :])
    else:
        return tl.load(weight_rows[:, None] + columns[None, :], mask=(columns < SIZE)[None, :], other=0.0)


@triton.jit
def _load_tokens(token_rows, columns, real, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    if SIZE % BLOCK_K == 0:
        return tl.load(token_rows[:, None] + columns[None, :], mask=real[:, None], other=0.0)
    else:
        mask = real[:, None] & (columns < SIZE)[None, :]
        return tl.load(token_rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _up_kernel(
    x_RD,
    gate_up_EGD,
    rows_X,
    ends_E,
    act_XF,
    stride_units,
    UNIT: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    last_tiles_E = _last_tiles(ends_E, E, BLOCK_E, BLOCK_N, (F + BLOCK_M - 1) // BLOCK_M)
    num_tiles = tl.max(last_tiles_E, 0)
    tile = tl.program_id(0)
    while tile < num_tiles:
        expert, output_tile, first_place, end = _find_tile(tile, last_tiles_E, ends_E, BLOCK_N)
        places = first_place + tl.arange(0, BLOCK_N)
        real = places < end
        rows = tl.load(rows_X + places, mask=real, other=0).to(tl.int64)
        token_rows = x_RD + rows * stride_units * UNIT
        outputs = output_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        # Outputs past the last repeat it, which saves a mask; they are not stored.
        outputs_here = outputs if F % BLOCK_M == 0 else tl.minimum(outputs, F - 1)
        gate_rows = gate_up_EGD + (expert.to(tl.int64) * (2 * F) + outputs_here) * D
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
            columns = k + tl.arange(0, BLOCK_K)
            x = tl.trans(_load_tokens(token_rows, columns, real, D, BLOCK_K))
            gate = tl.dot(_load_weights(gate_rows, columns, D, BLOCK_K), x, gate, input_precision="ieee")
            up = tl.dot(_load_weights(gate_rows + F * D, columns, D, BLOCK_K), x, up, input_precision="ieee")
        act = tl.trans(gate / (1 + tl.exp(-gate)) * up)
        target = act_XF + places.to(tl.int64)[:, None] * F + outputs[None, :]
        tl.store(target, act.to(act_XF.dtype.element_ty), mask=real[:, None] & (outputs < F)[None, :])
        tile += tl.num_programs(0)


@triton.jit
def _down_kernel(
    act_XF,
    down_EDF,
    ends_E,
    y_XD,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    last_tiles_E = _last_tiles(ends_E, E, BLOCK_E, BLOCK_N, (D + BLOCK_M - 1) // BLOCK_M)
    num_tiles = tl.max(last_tiles_E, 0)
    tile = tl.program_id(0)
    while tile < num_tiles:
        expert, output_tile, first_place, end = _find_tile(tile, last_tiles_E, ends_E, BLOCK_N)
        places = first_place + tl.arange(0, BLOCK_N)
        real = places < end
        token_rows = act_XF + places.to(tl.int64) * F
        outputs = output_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        outputs_here = outputs if D % BLOCK_M == 0 else tl.minimum(outputs, D - 1)
        weight_rows = down_EDF + (expert.to(tl.int64) * D + outputs_here) * F
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, F, BLOCK_K, num_stages=STAGES):
            columns = k + tl.arange(0, BLOCK_K)
            act = tl.trans(_load_tokens(token_rows, columns, real, F, BLOCK_K))
            y = tl.dot(_load_weights(weight_rows, columns, F, BLOCK_K), act, y, input_precision="ieee")
        target = y_XD + places.to(tl.int64)[:, None] * D + outputs[None, :]
        tl.store(target, tl.trans(y).to(y_XD.dtype.element_ty), mask=real[:, None] & (outputs < D)[None, :])
        tile += tl.num_programs(0)


def choose_tiles(pairs_per_expert: float, dtype: torch.dtype, *, large_shared: bool) -> tuple[Tile, Tile]:
    """The tiles of `up` and of `down`.

    pairs_per_expert: if all were local. large_shared: whether a program may take 160 KB of shared memory.
    Only N depends on the number of pairs, so that the bits do not.
    """
    if dtype == torch.float32:  # no tensor cores at full precision: small tiles, whose sums stay in registers
        return Tile(32, 16, 32, 2), Tile(32, 16, 32, 2)
    up_n = 16 if pairs_per_expert <= 16 else 32 if pairs_per_expert <= 32 else 64
    down_n = 16 if pairs_per_expert <= 32 else 32 if pairs_per_expert <= 128 else 64
    return Tile(64, up_n, 128 if large_shared else 64, 3), Tile(128, down_n, 64, 3)


@lru_cache(maxsize=NUM_SHAPES)
def _up(stride_row: int, num_experts: int, size: int, width: int, tile: Tile) -> Launch:
    unit = stride_unit(stride_row)
    sizes = {"E": num_experts, "D": size, "F": width, "BLOCK_E": power_of_two(num_experts)}
    return PersistentLaunch(
        _up_kernel,
        integers=(stride_row // unit,),
        constants={"UNIT": unit, **sizes, **asdict(tile)},
        num_warps=_NUM_WARPS,
    )


@lru_cache(maxsize=NUM_SHAPES)
def _down(num_experts: int, size: int, width: int, tile: Tile) -> Launch:
    sizes = {"E": num_experts, "D": size, "F": width, "BLOCK_E": power_of_two(num_experts)}
    return PersistentLaunch(_down_kernel, constants={**sizes, **asdict(tile)}, num_warps=_NUM_WARPS)


@lru_cache(maxsize=64)
def _large_shared(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(getattr(properties, "shared_memory_per_block_optin", 0) >= _LARGE_SHARED_BYTES)


def multiply_few(
    x_RD: torch.Tensor,
    rows_X: torch.Tensor,
    ends_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    workspace: ExpertWorkspace,
) -> torch.Tensor:
    """`down(silu(gate x) * up x)` at the place of each pair: [X, D] in x's dtype, undefined past the last end.

    x_RD: dense rows at any stride. The result belongs to the workspace and is valid until its next use.
    """
    assert gate_up_EGD.is_contiguous() and down_EDF.is_contiguous(), "weights of experts have gaps"
    num_pairs, size = rows_X.shape[0], x_RD.shape[1]
    num_experts, _, width = down_EDF.shape
    act_XF, y_XD = workspace.get_apart("pairs", ((num_pairs, width), (num_pairs, size)), x_RD.dtype, x_RD.device)
    up, down = choose_tiles(num_pairs / num_experts, x_RD.dtype, large_shared=_large_shared(x_RD.device))
    _up(x_RD.stride(0), num_experts, size, width, up)(x_RD, gate_up_EGD, rows_X, ends_E, act_XF)
    _down(num_experts, size, width, down)(act_XF, down_EDF, ends_E, y_XD)
    return y_XD
