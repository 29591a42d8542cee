"""The experts of one rank without waiting for the host: places on the device, grouped products, weighted sum.

    count      how many pairs each block of pairs has for each expert
    place      where each pair goes: pairs in order of expert, then of row; -1 for the experts of other ranks
    spread     each row is read once and written to the places of its pairs
    product, gated silu, product                  work for real pairs only: the device knows how many there are
    add up     for each row, the weighted sum over its places, in float32 at least

Buffers are sized for the worst case, that every pair is local; memory traffic is that of the pairs that are.

Shapes: as in `grouped_experts`; `N` blocks of pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antiphon.kernels.expert_workspace import ExpertWorkspace
from antiphon.kernels.fused.activation import launch_gated_silu
from antiphon.kernels.fused.launch import column_block, stride_unit, wide_type
from antiphon.kernels.grouped_experts import grouped_product

__all__ = ["add_up", "grouped_experts_fused", "place_pairs", "spread_rows"]

_PAIRS_PER_BLOCK = 128


# ---- which place


@triton.jit
def _local_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K: tl.constexpr, E: tl.constexpr):
    """Index among this rank's experts of each pair; -1 for another rank's, and behind the last pair."""
    inside = pairs < num_pairs
    offsets = (pairs // K).to(tl.int64) * stride_row + (pairs % K) * stride_slot
    expert = (tl.load(ids + offsets, mask=inside, other=-1) - first_expert).to(tl.int32)
    return tl.where(inside & (expert >= 0) & (expert < E), expert, -1)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "first_expert"])
def _count_kernel(
    ids,
    counts_EN,
    num_pairs,
    num_blocks,
    stride_row,
    stride_slot,
    first_expert,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    pairs = block * BLOCK + tl.arange(0, BLOCK)
    expert = _local_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K, E)
    experts_E = tl.arange(0, BLOCK_E)
    hits = (expert[:, None] == experts_E[None, :]).to(tl.int32)
    tl.store(counts_EN + experts_E * num_blocks + block, tl.sum(hits, 0), mask=experts_E < E)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "first_expert"])
def _place_kernel(
    ids,
    sums_EN,
    places,
    ends_E,
    num_pairs,
    num_blocks,
    stride_row,
    stride_slot,
    first_expert,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    pairs = block * BLOCK + lanes
    expert = _local_experts(ids, pairs, num_pairs, stride_row, stride_slot, first_expert, K, E)
    earlier = (expert[None, :] == expert[:, None]) & (lanes[None, :] < lanes[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    # Sums run over experts, then blocks: what stands before this block's own count is where its pairs begin.
    before = expert * num_blocks + block - 1
    start = tl.load(sums_EN + before, mask=(expert >= 0) & (before >= 0), other=0)
    tl.store(places + pairs, tl.where(expert >= 0, start + rank, -1), mask=pairs < num_pairs)
    if block == 0:
        experts_E = tl.arange(0, BLOCK_E)
        end = tl.load(sums_EN + experts_E * num_blocks + num_blocks - 1, mask=experts_E < E, other=0)
        tl.store(ends_E + experts_E, end, mask=experts_E < E)


def place_pairs(
    ids_RK: torch.Tensor, num_experts: int, workspace: ExpertWorkspace, *, first_expert: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [R, K] of all pairs, -1 for the experts of other ranks, and ends [E] of the experts' places; both int32.

    Both belong to the workspace and hold until its next use. ids_RK: int32 or int64, any strides, R above 0.
    """
    num_pairs, top_k = ids_RK.numel(), ids_RK.shape[1]
    num_blocks = triton.cdiv(num_pairs, _PAIRS_PER_BLOCK)
    counts_X = workspace.get("counts", num_experts * num_blocks, torch.int32, ids_RK.device)
    sums_X = workspace.get("sums", num_experts * num_blocks, torch.int32, ids_RK.device)
    places_X = workspace.get("places", num_pairs, torch.int32, ids_RK.device)
    ends_E = workspace.get("ends", num_experts, torch.int32, ids_RK.device)
    sizes = (num_pairs, num_blocks, *ids_RK.stride(), first_expert)
    constants = {
        "K": top_k,
        "E": num_experts,
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "BLOCK": _PAIRS_PER_BLOCK,
    }
    _count_kernel[(num_blocks,)](ids_RK, counts_X, *sizes, **constants)
    torch.cumsum(counts_X, 0, dtype=torch.int32, out=sums_X)
    _place_kernel[(num_blocks,)](ids_RK, sums_X, places_X, ends_E, *sizes, **constants)
    return places_X.view(ids_RK.shape), ends_E


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


def spread_rows(x_RD: torch.Tensor, places_RK: torch.Tensor, x_XD: torch.Tensor) -> None:
    """Copy each row to its places. Rows without a place are not read; places without a row are not written."""
    (num_rows, size), top_k = x_RD.shape, places_RK.shape[1]
    unit = stride_unit(x_RD.stride(0))
    block = column_block(size)
    _spread_kernel[(num_rows, triton.cdiv(size, block))](
        x_RD,
        places_RK,
        x_XD,
        x_RD.stride(0) // unit,
        D=size,
        K=top_k,
        UNIT=unit,
        BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_D=block,
    )


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
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], WIDE)
    for slot in tl.static_range(K):
        place = tl.load(places_RK + row * K + slot).to(tl.int64)
        here = place >= 0
        # Masked, not multiplied by 0: what other ranks' pairs hold may be infinite.
        weight = tl.load(weights_RK + row * weights_stride_row + slot * weights_stride_slot, mask=here, other=0)
        y_D = tl.load(y_XD + place * D + columns, mask=(columns < D) & here, other=0)
        sum_D += weight.to(WIDE) * y_D.to(WIDE)
    tl.store(out_RD + row * out_stride_units * UNIT + columns, sum_D.to(out_RD.dtype.element_ty), mask=columns < D)


def add_up(y_XD: torch.Tensor, places_RK: torch.Tensor, weights_RK: torch.Tensor, out_RD: torch.Tensor) -> None:
    """Write into each row of `out_RD` the weighted sum of what is at its places; 0 where it has none."""
    (num_rows, size), top_k = out_RD.shape, places_RK.shape[1]
    unit = stride_unit(out_RD.stride(0))
    block = column_block(size)
    _add_up_kernel[(num_rows, triton.cdiv(size, block))](
        y_XD,
        places_RK,
        weights_RK,
        out_RD,
        *weights_RK.stride(),
        out_RD.stride(0) // unit,
        D=size,
        K=top_k,
        UNIT=unit,
        BLOCK_D=block,
        WIDE=wide_type(y_XD.dtype),
    )


# ---- all of it


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
    """See `grouped_experts`. bfloat16 on SM90 and later never waits for the host; other dtypes wait in the products."""
    num_rows, size = x_RD.shape
    num_experts, width = gate_up_EGD.shape[0], down_EDF.shape[2]
    out_RD = x_RD.new_empty(num_rows, size) if out_RD is None else out_RD
    workspace = workspace or ExpertWorkspace()
    if x_RD.stride(1) != 1:
        x_RD = x_RD.contiguous()
    assert out_RD.stride(1) == 1, "out_RD has gaps inside its rows"
    top_k = ids_RK.shape[1]
    rows_per_pass = max(1, workspace.max_pairs // top_k)
    for start in range(0, num_rows, rows_per_pass):
        rows = slice(start, min(start + rows_per_pass, num_rows))
        places_RK, ends_E = place_pairs(ids_RK[rows], num_experts, workspace, first_expert=first_expert)
        num_pairs = places_RK.numel()
        pairs = workspace.get("pairs", num_pairs * max(size, width), x_RD.dtype, x_RD.device)
        x_XD = pairs[: num_pairs * size].view(num_pairs, size)
        spread_rows(x_RD[rows], places_RK, x_XD)
        gate_up_XG = grouped_product(x_XD, gate_up_EGD, ends_E)
        # In the memory of x_XD, which the product behind us has read.
        act_XF = pairs[: num_pairs * width].view(num_pairs, width)
        launch_gated_silu(gate_up_XG, act_XF, ends_E)
        del gate_up_XG  # before the next product allocates
        y_XD = grouped_product(act_XF, down_EDF, ends_E)
        add_up(y_XD, places_RK, weights_RK[rows], out_RD[rows])
    return out_RD
