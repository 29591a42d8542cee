"""The experts of one rank applied to the rows it received: sort by expert, two grouped GEMMs, weighted sum.

Shapes: `R` rows, `K` experts per token, `E` experts of this rank, `D` hidden size, `F` expert width,
`X` (row, expert) pairs that this rank computes, `G` = 2F (gate and up), `N` outputs of a GEMM.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F

from antiphon.core.warn_once import warn_once
from antiphon.kernels.dispatch import fused, takes_cuda_kernels
from antiphon.kernels.expert_choice import GROUPED_KERNELS, ExpertChoice, is_unaligned, major_capability

_APART = 16  # views of one buffer start at multiples of this many elements, for wide loads
_MAX_VIEWS = 1024
_LOOP_COST = "GEMMs run one after the other, and the host waits for the device in every layer"


class ExpertWorkspace:
    """Buffers that `grouped_experts` keeps between calls on a CUDA device; they only grow.

    All lanes and layers of a rank may share a workspace. Lanes queue their expert computation on the same compute
    stream, so the kernels of two calls never overlap, and no contents are needed after a call. Computation on two
    streams needs two workspaces.

    max_pairs: (row, expert) pairs, local or not, per pass; more rows take several passes over the weights.
    It bounds the memory, because buffers are sized for the case that all pairs are local.
    choice: which kernels compute how many rows; `tune_experts` measures it.
    """

    def __init__(self, *, max_pairs: int = 262_144) -> None:
        self.max_pairs = max_pairs
        self.choice = ExpertChoice()
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[object, ...], tuple[torch.Tensor, ...]] = {}
        self._frozen = False
        self._retired: list[torch.Tensor] = []  # buffers that only captured graphs use

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A view of a buffer, contents undefined; valid until the next `get` of that name."""
        return self.get_shared(name, (shape,), dtype, device)[0]

    def get_shared(
        self, name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """Several views of the same memory, for use one after the other."""
        key = (name, shapes, dtype, device)
        views = self._views.get(key)
        if views is None:
            with torch.inference_mode(False):  # so that the buffers work both inside and outside inference mode
                buffer = self._buffer(name, max(map(math.prod, shapes)), dtype, device)
                views = tuple(buffer[: math.prod(shape)].view(shape) for shape in shapes)
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = views
        return views

    def get_apart(
        self, name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """Several views of one buffer that do not overlap, for use at the same time."""
        key = ("apart", name, shapes, dtype, device)
        views = self._views.get(key)
        if views is None:
            sizes = [math.prod(shape) for shape in shapes]
            starts = [0, *accumulate(-(-size // _APART) * _APART for size in sizes)]
            buffer = self.get(name, (starts[-1],), dtype, device)
            with torch.inference_mode(False):
                pairs = zip(starts, sizes, shapes, strict=False)
                views = tuple(buffer[start : start + size].view(shape) for start, size, shape in pairs)
            self._views[key] = views
        return views

    def freeze(self) -> None:
        """Keep every buffer alive from now on, because CUDA graphs hold their addresses.

        To be called after `reserve_experts`. A call that needs more memory than was reserved then gets a larger buffer
        beside the old one, with one warning: that memory is in nobody's budget.
        """
        self._frozen = True

    def _buffer(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < size or buffer.dtype != dtype or buffer.device != device:
            if self._frozen and buffer is not None:
                self._retired.append(buffer)
                warn_once(
                    f"the experts need {size * dtype.itemsize} bytes for {name!r} and had reserved {buffer.nbytes}",
                    cost="both stay allocated, because captured graphs use the smaller one",
                    remedy="report it: batches larger than the largest step should not come",
                )
            self._buffers.pop(name, None)
            self._views.clear()  # they keep the memory alive
            del buffer  # free it before the larger one is allocated
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return buffer

    @property
    def num_bytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.nbytes for buffer in [*self._buffers.values(), *self._retired])


@fused("experts")
def grouped_experts(
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
    """The weighted sum over this rank's experts of `down(silu(gate x) * up x)` for every row: [R, D] in x's dtype.

    x_RD, weights_RK and ids_RK may be views of the packed rows of a slab. ids_RK: int64 or int32; this rank holds the
    experts from `first_expert` on, and any other id, such as -1, is ignored. weights_RK: float32 (or float64).
    gate_up_EGD: [E, 2F, D], gate rows above up rows. down_EDF: [E, D, F].
    Products are in x's dtype, the sum over experts is in float32 at least. A row without local experts is zero.
    The result is written to `out_RD` if given, else it is new. The caller owns it; it is safe on the current stream.
    workspace: memory kept between calls on CUDA devices; without it each call allocates its own.
    """
    if x_RD.shape[0] == 0:
        return x_RD.new_empty(x_RD.shape) if out_RD is None else out_RD
    num_experts = gate_up_EGD.shape[0]
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    sums_RD = torch.zeros(x_RD.shape, dtype=wide, device=x_RD.device)
    pair_ids = ids_RK.flatten() - first_expert
    pair_ids.masked_fill_((pair_ids < 0) | (pair_ids >= num_experts), -1)
    order_X = pair_ids.argsort(stable=True)
    order_X = order_X[(pair_ids < 0).sum() :]
    rows_X = order_X // ids_RK.shape[1]
    ends_E = torch.bincount(pair_ids[order_X], minlength=num_experts).cumsum(0)
    gate_XF, up_XF = grouped_product(x_RD[rows_X], gate_up_EGD, ends_E).chunk(2, dim=-1)
    y_XD = grouped_product(F.silu(gate_XF) * up_XF, down_EDF, ends_E)
    sums_RD.index_add_(0, rows_X, y_XD.to(wide) * weights_RK.flatten()[order_X].to(wide).unsqueeze(1))
    return sums_RD.to(x_RD.dtype) if out_RD is None else out_RD.copy_(sums_RD)


def grouped_product(x_XD: torch.Tensor, weight_END: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """`x @ weight[e].T` for the rows of each expert e, which end at `ends_E[e]`: [X, N].

    Rows after the last end are undefined. The host waits for a CUDA device unless the dtype is bfloat16.
    """
    unaligned = is_unaligned(x_XD.dtype, (x_XD.shape[1], weight_END.shape[1]))
    # On CUDA devices torch has a grouped kernel for bfloat16 only; its treatment of other dtypes varies by version.
    on_cuda = takes_cuda_kernels(x_XD)
    in_a_loop = x_XD.dtype == torch.float64 if x_XD.is_cpu else x_XD.dtype != torch.bfloat16 or not on_cuda
    if on_cuda:
        _warn_of_loop(x_XD.dtype, unaligned, major_capability(x_XD.device))
    if in_a_loop or unaligned or x_XD.shape[0] == 0:
        return grouped_product_reference(x_XD, weight_END, ends_E)
    ends_E = ends_E if ends_E.dtype == torch.int32 else ends_E.to(torch.int32)
    return F.grouped_mm(x_XD.contiguous(), weight_END.transpose(1, 2), offs=ends_E)


@lru_cache(maxsize=64)
def _warn_of_loop(dtype: torch.dtype, unaligned: bool, major: int) -> None:
    """Warn if the experts run one by one on a GPU, in the loop below or in torch's."""
    if dtype != torch.bfloat16:
        kind = str(dtype).removeprefix("torch.")
        warn_once(
            f"experts run one by one on a GPU in {kind}", cost=_LOOP_COST, remedy="use bfloat16 where speed matters"
        )
    elif unaligned:
        fact = "experts run one by one on a GPU, because their widths are not multiples of 16 bytes"
        warn_once(fact, cost=_LOOP_COST, remedy="use a model with wider experts, or pad them with zeros")
    elif major not in GROUPED_KERNELS:
        fact = f"experts run one by one on a GPU, because torch has no grouped GEMM for compute capability {major}.x"
        warn_once(fact, cost=_LOOP_COST, remedy="use a GPU of compute capability 9 or 10")


def grouped_product_reference(x_XD: torch.Tensor, weight_END: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """`grouped_product` as a loop over experts, for any dtype and size."""
    out_XN = x_XD.new_empty(x_XD.shape[0], weight_END.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_XD[start:end], weight_END[expert].t(), out=out_XN[start:end])
        start = end
    return out_XN
