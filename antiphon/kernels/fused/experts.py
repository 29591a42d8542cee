"""The experts of one rank without host waits: places computed on the device, products, weighted sum.

Few rows are computed by `antiphon.kernels.fused.small_experts`, many by grouped GEMMs:

    count      count the pairs of each expert in each block of pairs
    place      give each pair a place: in order of expert, then of row; -1 for the experts of other ranks
    spread     read each row once and write it to the places of its pairs
    multiply   GEMM, gated silu, GEMM over the local pairs only, whose number is known on the device
    add up     compute each row's weighted sum over its places, in float32 at least

Buffers are sized for the worst case, in which every pair is local; memory traffic is for the local pairs only.

Shapes: as in `grouped_experts`; `N` blocks of pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from antiphon.kernels.fused.activation import launch_gated_silu
from antiphon.kernels.fused.launch import (
    NUM_SHAPES,
    Launch,
    column_block,
    divide_up,
    is_double,
    power_of_two,
    stride_unit,
)
from antiphon.kernels.fused.small_experts import SMALL_DTYPES, multiply_few, place_few
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_product

_MAX_BLOCKS = 128  # of pairs: about as many as SMs, but few enough counts to add up in every block
_MIN_PART, _MAX_PART = 16, 128  # pairs that a block takes at a time
_TILE_ELEMENTS = 8192
_COUNTS_PER_LOAD = 4096
_FEW_ROWS = 512


# ---- the place of each pair


@triton.jit
def _local_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K: tl.constexpr, E: tl.constexpr):
    """The local index of each pair's expert; -1 for the experts of other ranks, and past the last pair."""
    inside = pairs < num_pairs
    offsets = (pairs // K).to(tl.int64) * stride_row + (pairs % K) * stride_slot
    expert = (tl.load(ids + offsets, mask=inside, other=-1) - first_expert).to(tl.int32)
    return tl.where(inside & (expert >= 0) & (expert < E), expert, -1)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "num_parts", "first_expert"])
def _count_kernel(
    ids,
    counts_NE,
    num_pairs,
    num_blocks,
    num_parts,
    stride_row,
    stride_slot,
    first_expert,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    block = tl.program_id(0)
    experts_E = tl.arange(0, BLOCK_E)
    count_E = tl.zeros([BLOCK_E], tl.int32)
    part = block * num_parts
    end = part + num_parts
    while part < end:
        pairs = part * PART + tl.arange(0, PART)
        expert = _local_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K, E)
        count_E += tl.sum((expert[:, None] == experts_E[None, :]).to(tl.int32), 0)
        part += 1
    tl.store(counts_NE + block * E + experts_E, count_E, mask=experts_E < E)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "num_parts", "first_expert"])
def _place_kernel(
    ids,
    counts_NE,
    places,
    ends_E,
    num_pairs,
    num_blocks,
    num_parts,
    stride_row,
    stride_slot,
    first_expert,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    block = tl.program_id(0)
    experts_E = tl.arange(0, BLOCK_E)
    # Every block adds up all counts: they are few, and a separate launch would cost more.
    total_E = tl.zeros([BLOCK_E], tl.int32)
    before_E = tl.zeros([BLOCK_E], tl.int32)
    blocks_N = tl.arange(0, BLOCK_N)
    first = num_blocks * 0
    while first < num_blocks:
        mask = (blocks_N < num_blocks)[:, None] & (experts_E < E)[None, :]
        count_NE = tl.load(counts_NE + blocks_N[:, None] * E + experts_E[None, :], mask=mask, other=0)
        total_E += tl.sum(count_NE, 0)
        before_E += tl.sum(tl.where((blocks_N < block)[:, None], count_NE, 0), 0)
        blocks_N += BLOCK_N
        first += BLOCK_N
    end_E = tl.cumsum(total_E, 0)
    if block == 0:
        tl.store(ends_E + experts_E, end_E, mask=experts_E < E)
    next_E = end_E - total_E + before_E  # where the next pair of each expert goes
    lanes = tl.arange(0, PART)
    part = block * num_parts
    end = part + num_parts
    while part < end:
        pairs = part * PART + lanes
        expert = _local_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K, E)
        earlier = (expert[None, :] == expert[:, None]) & (lanes[None, :] < lanes[:, None])
        hits = (expert[:, None] == experts_E[None, :]).to(tl.int32)
        place = tl.sum(earlier.to(tl.int32), 1) + tl.sum(hits * next_E[None, :], 1)
        tl.store(places + pairs, tl.where(expert >= 0, place, -1), mask=pairs < num_pairs)
        next_E += tl.sum(hits, 0)
        part += 1


@lru_cache(maxsize=NUM_SHAPES)
def _count_and_place(
    num_rows: int, top_k: int, strides: tuple[int, int], num_experts: int, first_expert: int
) -> tuple[int, Launch, Launch]:
    """The number of blocks, the launch that counts and the launch that places."""
    num_pairs = num_rows * top_k
    block_e = power_of_two(num_experts)
    part = max(_MIN_PART, min(_MAX_PART, _TILE_ELEMENTS // block_e))
    num_parts = divide_up(num_pairs, part * _MAX_BLOCKS)
    num_blocks = divide_up(num_pairs, part * num_parts)
    integers = (num_pairs, num_blocks, num_parts, *strides, first_expert)
    constants = {
        "K": top_k,
        "E": num_experts,
        "BLOCK_E": block_e,
        "BLOCK_N": max(1, _COUNTS_PER_LOAD // block_e),
        "PART": part,
    }
    num_warps = 4 if block_e <= 64 else 8
    count, place = (
        Launch(kernel, (num_blocks, 1), integers=integers, constants=constants, num_warps=num_warps)
        for kernel in (_count_kernel, _place_kernel)
    )
    return num_blocks, count, place


def place_pairs(
    ids_RK: torch.Tensor, num_experts: int, workspace: ExpertWorkspace, *, first_expert: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places [R, K] of all pairs, -1 for the experts of other ranks, and the end [E] of each expert's places.

    Both are int32, belong to the workspace and are valid until its next use.
    ids_RK: int32 or int64, any strides, R above 0.
    """
    num_rows, top_k = ids_RK.shape
    num_blocks, count, place = _count_and_place(num_rows, top_k, ids_RK.stride(), num_experts, first_expert)
    device = ids_RK.device
    # More rows may take fewer blocks, so the buffer has room for all: it must not grow once it is frozen.
    counts_NE = workspace.get("counts", (max(num_blocks, _MAX_BLOCKS), num_experts), torch.int32, device)
    places_RK = workspace.get("places", (num_rows, top_k), torch.int32, device)
    ends_E = workspace.get("ends", (num_experts,), torch.int32, device)
    count(ids_RK, counts_NE)
    place(ids_RK, counts_NE, places_RK, ends_E)
    return places_RK, ends_E


# ---- rows to places and back


@triton.jit
def _spread_kernel(
    x_RD,
    places_RK,
    x_XD,
    stride_units,
    D: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slots = tl.arange(0, BLOCK_K)
    places = tl.load(places_RK + row * K + slots, mask=slots < K, other=-1)
    if tl.max(places, 0) >= 0:
        x_D = tl.load(x_RD + row * stride_units * UNIT + columns, mask=columns < D, other=0)
        for slot in tl.static_range(K):
            place = tl.load(places_RK + row * K + slot).to(tl.int64)
            tl.store(x_XD + place * D + columns, x_D, mask=(columns < D) & (place >= 0))


@lru_cache(maxsize=NUM_SHAPES)
def _spread(num_rows: int, size: int, stride_row: int, top_k: int) -> Launch:
    unit, block = stride_unit(stride_row), column_block(size)
    return Launch(
        _spread_kernel,
        (num_rows, divide_up(size, block)),
        integers=(stride_row // unit,),
        constants={"D": size, "K": top_k, "UNIT": unit, "BLOCK_K": power_of_two(top_k), "BLOCK_D": block},
    )


def spread_rows(x_RD: torch.Tensor, places_RK: torch.Tensor, x_XD: torch.Tensor) -> None:
    """Copy each row to its places. Rows without a place are not read; places without a row are not written."""
    _spread(*x_RD.shape, x_RD.stride(0), places_RK.shape[1])(x_RD, places_RK, x_XD)


@triton.jit
def _add_up_kernel(
    y_XD,
    places_RK,
    weights_RK,
    out_RD,
    weights_stride_row,
    weights_stride_slot,
    out_stride_units,
    D: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], WIDE)
    for slot in tl.static_range(K):
        place = tl.load(places_RK + row * K + slot).to(tl.int64)
        here = place >= 0
        # Masked, not multiplied by 0: the weights of other ranks' pairs may be infinite.
        weight = tl.load(weights_RK + row * weights_stride_row + slot * weights_stride_slot, mask=here, other=0)
        y_D = tl.load(y_XD + place * D + columns, mask=(columns < D) & here, other=0)
        sum_D += weight.to(WIDE) * y_D.to(WIDE)
    tl.store(out_RD + row * out_stride_units * UNIT + columns, sum_D.to(out_RD.dtype.element_ty), mask=columns < D)


@lru_cache(maxsize=NUM_SHAPES)
def _add_up(
    num_rows: int, size: int, stride_row: int, top_k: int, weights_strides: tuple[int, int], double: bool
) -> Launch:
    unit, block = stride_unit(stride_row), column_block(size)
    if num_rows <= _FEW_ROWS:  # narrower, for more programs at a time
        block = min(block, 256 if num_rows < _FEW_ROWS // 4 else 512)
    return Launch(
        _add_up_kernel,
        (num_rows, divide_up(size, block)),
        integers=(*weights_strides, stride_row // unit),
        constants={"D": size, "K": top_k, "UNIT": unit, "BLOCK_D": block, "DOUBLE": double},
        num_warps=2 if num_rows <= _FEW_ROWS else 4,
    )


def add_up(y_XD: torch.Tensor, places_RK: torch.Tensor, weights_RK: torch.Tensor, out_RD: torch.Tensor) -> None:
    """Write the weighted sum over its places to each row of `out_RD`; 0 if it has none."""
    launch = _add_up(*out_RD.shape, out_RD.stride(0), places_RK.shape[1], weights_RK.stride(), is_double(y_XD.dtype))
    launch(y_XD, places_RK, weights_RK, out_RD)


# ---- all steps


def grouped_experts_fused(
    x_RD: torch.Tensor,
    ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    out_RD: torch.Tensor | None = None,
    first_expert: int = 0,
    workspace: ExpertWorkspace | None = None,
) -> torch.Tensor:
    """See `grouped_experts`. `ExpertChoice` says which kernels compute it.

    The host waits for the device only if these are grouped products in another dtype than bfloat16, or not on SM90
    or SM100. Otherwise a call can be captured in a CUDA graph, once a call of the same shape has compiled its kernels.
    """
    num_rows, size = x_RD.shape
    out_RD = x_RD.new_empty(num_rows, size) if out_RD is None else out_RD
    if num_rows == 0:
        return out_RD
    workspace = workspace or ExpertWorkspace()
    if x_RD.stride(1) != 1:
        x_RD = x_RD.contiguous()
    assert out_RD.stride(1) == 1, "out_RD has gaps inside its rows"
    rows_per_pass = max(1, workspace.max_pairs // ids_RK.shape[1])
    passes: list[tuple[torch.Tensor, ...]] = [(x_RD, ids_RK, weights_RK, out_RD)]
    if num_rows > rows_per_pass:
        passes = list(zip(*(tensor.split(rows_per_pass) for tensor in passes[0]), strict=True))
    for x, ids, weights, out in passes:
        compute = compute_few if workspace.choice.takes_small(x, down_EDF.shape[2]) else compute_many
        compute(x, ids, weights, gate_up_EGD, down_EDF, out, first_expert=first_expert, workspace=workspace)
    return out_RD


def compute_few(
    x_RD: torch.Tensor,
    ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    out_RD: torch.Tensor,
    *,
    first_expert: int,
    workspace: ExpertWorkspace,
) -> None:
    """`grouped_experts` by the kernels for few rows; R above 0, rows dense, of one of `SMALL_DTYPES`."""
    assert x_RD.dtype in SMALL_DTYPES, f"the kernels for few rows do not multiply {x_RD.dtype}"
    places_RK, rows_X, ends_E = place_few(ids_RK, gate_up_EGD.shape[0], workspace, first_expert=first_expert)
    y_XD = multiply_few(x_RD, rows_X, ends_E, gate_up_EGD, down_EDF, workspace)
    add_up(y_XD, places_RK, weights_RK, out_RD)


def compute_many(
    x_RD: torch.Tensor,
    ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    out_RD: torch.Tensor,
    *,
    first_expert: int,
    workspace: ExpertWorkspace,
) -> None:
    """`grouped_experts` by grouped products; R above 0, rows dense."""
    size, width = x_RD.shape[1], down_EDF.shape[2]
    places_RK, ends_E = place_pairs(ids_RK, gate_up_EGD.shape[0], workspace, first_expert=first_expert)
    num_pairs = places_RK.numel()
    x_XD, act_XF = workspace.get_shared("pairs", ((num_pairs, size), (num_pairs, width)), x_RD.dtype, x_RD.device)
    spread_rows(x_RD, places_RK, x_XD)
    gate_up_XG = grouped_product(x_XD, gate_up_EGD, ends_E)
    launch_gated_silu(gate_up_XG, act_XF, ends_E)  # overwrites x_XD, which the first product has read
    del gate_up_XG  # before the next product allocates
    y_XD = grouped_product(act_XF, down_EDF, ends_E)
    add_up(y_XD, places_RK, weights_RK, out_RD)
