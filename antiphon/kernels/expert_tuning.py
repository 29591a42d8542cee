"""What an engine does about experts before it captures graphs: measure the choice of kernels, reserve memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from antiphon.kernels.dispatch import takes_cuda_kernels
from antiphon.kernels.expert_choice import Timing, runs_in_a_loop
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_experts

TUNED_ROWS = (32, 64, 128, 256, 512, 1024, 2048)
_REPLAYS = 3


def tune_experts(
    workspace: ExpertWorkspace,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    num_experts: int,
    top_k: int,
    rows: Sequence[int] = TUNED_ROWS,
) -> bool:
    """Measure on the current device which kernels compute how many rows fastest; whether there was a choice.

    Rows are random, and ids uniform over all `num_experts` of the model, of which the weights hold E. Takes about
    0.1 s, beside the compilation of kernels that are used anyway, and resolves `workspace.choice`. There is no
    choice on CPUs and where grouped products run expert by expert.

    Both kinds are timed in CUDA graphs, because an engine replays them there, and because host time is not compared.
    Not to be called while another thread uses the device, nor after `ExpertWorkspace.freeze`.
    """
    size, width = gate_up_EGD.shape[2], down_EDF.shape[2]
    dtype, device = gate_up_EGD.dtype, gate_up_EGD.device
    if not takes_cuda_kernels(gate_up_EGD) or runs_in_a_loop(dtype, (size, width), device):
        return False
    generator = torch.Generator(device).manual_seed(0)
    choice, before = workspace.choice, workspace.choice.small_rows
    timings = []
    try:
        for num_rows in rows:
            x_RD = torch.randn(num_rows, size, generator=generator, device=device).to(dtype)
            scores_RE = torch.rand(num_rows, num_experts, generator=generator, device=device)
            weights_RK, ids_RK = scores_RE.topk(top_k)
            out_RD = torch.empty_like(x_RD)

            def compute(x=x_RD, ids=ids_RK, weights=weights_RK, out=out_RD) -> None:  # type: ignore[no-untyped-def]
                grouped_experts(x, ids, weights, gate_up_EGD, down_EDF, out_RD=out, workspace=workspace)

            microseconds = []
            for small_rows in (num_rows, 0):
                choice.set_small_rows(small_rows)
                microseconds.append(_time_in_graph(compute))
            timings.append(Timing(num_rows, *microseconds))
    except BaseException:
        choice.set_small_rows(before)
        raise
    choice.resolve(tuple(timings))
    return True


def _time_in_graph(compute: Callable[[], None]) -> float:
    """Microseconds of a call in a CUDA graph: the median of a few replays."""
    compute()  # compiles, and allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads that only watch the device, such as those of transports, may go on.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    graph.replay()
    samples = []
    for _ in range(_REPLAYS):
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(float(begin.elapsed_time(end)) * 1e3)
    return statistics.median(samples)


def reserve_experts(
    workspace: ExpertWorkspace, num_rows: int, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor, *, top_k: int
) -> None:
    """Grow the buffers to what any batch of up to `num_rows` rows takes, so that they can be frozen.

    Both kinds of kernels are run on rows of padding, which compute nothing. CPUs need no buffers.
    """
    if not takes_cuda_kernels(gate_up_EGD):
        return
    size = gate_up_EGD.shape[2]
    dtype, device = gate_up_EGD.dtype, gate_up_EGD.device
    choice = workspace.choice
    x_RD = torch.zeros(num_rows, size, dtype=dtype, device=device)
    ids_RK = torch.full((num_rows, top_k), -1, dtype=torch.int32, device=device)
    weights_RK = torch.zeros(num_rows, top_k, dtype=torch.promote_types(dtype, torch.float32), device=device)
    most_small = choice.limit(x_RD, down_EDF.shape[2])
    for few in {num_rows, max(1, min(most_small, num_rows))}:
        grouped_experts(x_RD[:few], ids_RK[:few], weights_RK[:few], gate_up_EGD, down_EDF, workspace=workspace)
