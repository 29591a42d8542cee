"""The experts of few rows on a CUDA device: at real shapes against float64, in graphs, and the measured choice."""

from __future__ import annotations

import pytest
import torch

from antiphon.kernels.expert_choice import runs_in_a_loop
from antiphon.kernels.expert_tuning import TUNED_ROWS, reserve_experts, tune_experts
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
ALWAYS, NEVER = 1 << 40, 0
TOP_K, NUM_IDS, FIRST, NUM_LOCAL = 8, 32, 8, 16


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def make_weights(hidden: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = randn(NUM_LOCAL, 2 * width, hidden, seed=1) / hidden**0.5
    down = randn(NUM_LOCAL, hidden, width, seed=2) / width**0.5
    return gate_up.to(dtype), down.to(dtype)


def packed_rows(
    num_rows: int, hidden: int, dtype: torch.dtype, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, ids and weights side by side in rows of bytes, as in a slab."""
    x_bytes = hidden * dtype.itemsize
    row_bytes = -(-(x_bytes + 8 * TOP_K) // 16) * 16 + 16
    rows = torch.full((num_rows, row_bytes), 255, dtype=torch.uint8, device="cuda")  # nan, and ids of -1
    x_RD = rows[:, :x_bytes].view(dtype)
    weights_RK = rows[:, x_bytes : x_bytes + 4 * TOP_K].view(torch.float32)
    ids_RK = rows[:, x_bytes + 4 * TOP_K : x_bytes + 8 * TOP_K].view(torch.int32)
    x_RD.copy_(randn(num_rows, hidden, seed=seed, dtype=dtype))
    weights_RK.copy_(randn(num_rows, TOP_K, seed=seed + 1).abs())
    ids_RK.copy_(randn(num_rows, NUM_IDS, seed=seed + 2).topk(TOP_K).indices)
    return x_RD, ids_RK, weights_RK


def workspace_for(small_rows: int) -> ExpertWorkspace:
    workspace = ExpertWorkspace()
    workspace.choice.set_small_rows(small_rows)
    return workspace


def compute(
    rows: tuple[torch.Tensor, ...], weights: tuple[torch.Tensor, ...], workspace: ExpertWorkspace
) -> torch.Tensor:
    return grouped_experts(*rows, *weights, first_expert=FIRST, workspace=workspace)  # type: ignore[arg-type]


def expected_of(rows: tuple[torch.Tensor, ...], weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """In float64."""
    x_RD, ids_RK, weights_RK = rows
    gate_up, down = (weight.double() for weight in weights)
    return grouped_experts.reference(x_RD.double(), ids_RK, weights_RK.double(), gate_up, down, first_expert=FIRST)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("hidden", "width"), [(2048, 768), (4096, 1408), (1000, 300), (72, 24)])
@pytest.mark.parametrize("num_rows", [1, 2, 32, 300, 512, 1500])
def test_experts_of_few_rows(num_rows: int, hidden: int, width: int, dtype: torch.dtype) -> None:
    """Some rows are padding, and one expert is wanted by every third row."""
    weights = make_weights(hidden, width, dtype)
    rows = packed_rows(num_rows, hidden, dtype, seed=3)
    ids_RK = rows[1]
    ids_RK[::3, 0] = FIRST + 1
    ids_RK[1::5] = -1
    rows[0][1::5] = float("nan")
    ids_RK[0, -1] = FIRST
    workspace = workspace_for(ALWAYS)
    compute(rows, weights, workspace)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out_RD = compute(rows, weights, workspace)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (out_RD[1::5] == 0).all()
    real = torch.ones(num_rows, dtype=torch.bool, device="cuda")
    real[1::5] = False
    expected_RD = expected_of(tuple(tensor[real] for tensor in rows), weights)
    assert relative_error(out_RD[real], expected_RD) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    """Whatever the width of the tiles, the place in them, and the neighbors."""
    weights = make_weights(2048, 768, dtype)
    rows = packed_rows(1500, 2048, dtype, seed=3)
    workspace = workspace_for(ALWAYS)
    together = compute(rows, weights, workspace)
    for part in (slice(0, 1), slice(77, 78), slice(40, 70), slice(100, 400), slice(900, 1412)):
        alone = compute(tuple(tensor[part] for tensor in rows), weights, workspace)
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_rows", [32, 300])
def test_replays_with_other_ids(num_rows: int, dtype: torch.dtype) -> None:
    """Captured once; replayed for other rows, for one hot expert, for padding only, and again."""
    weights = make_weights(256, 128, dtype)
    rows = packed_rows(num_rows, 256, dtype, seed=6)
    workspace = workspace_for(ALWAYS)
    reserve_experts(workspace, num_rows, *weights, top_k=TOP_K)
    workspace.freeze()
    compute(rows, weights, workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_RD = compute(rows, weights, workspace)
    cases = [packed_rows(num_rows, 256, dtype, seed=seed) for seed in (7, 8, 9, 10)]
    cases[1][1].fill_(-1)
    cases[1][1][:, 3] = FIRST + NUM_LOCAL - 1
    cases[2][1].fill_(-1)
    for case in cases:
        for tensor, source in zip(rows, case, strict=True):
            tensor.copy_(source)
        out_RD.fill_(float("nan"))
        graph.replay()
        expected_RD = expected_of(case, weights)
        if case is cases[2]:
            assert (out_RD == 0).all()
        else:
            assert relative_error(out_RD, expected_RD) < TOLERANCE[dtype]


def test_the_measured_choice() -> None:
    """Both kinds agree, and after measuring each number of rows takes the one that was faster."""
    weights = make_weights(2048, 768, torch.bfloat16)
    workspace = ExpertWorkspace()
    measured = tune_experts(workspace, *weights, num_experts=NUM_IDS, top_k=TOP_K)
    assert measured != runs_in_a_loop(torch.bfloat16, (2048, 768), weights[0].device)
    choice = workspace.choice
    if measured:
        assert [timing.num_rows for timing in choice.timings] == list(TUNED_ROWS)
        assert all(timing.small_us > 0 and timing.grouped_us > 0 for timing in choice.timings)
        assert choice.small_rows >= 32, choice.describe()
    for num_rows in (64, 1024):
        rows = packed_rows(num_rows, 2048, torch.bfloat16, seed=5)
        few, many = (compute(rows, weights, workspace_for(small_rows)) for small_rows in (ALWAYS, NEVER))
        assert relative_error(few, many) < 1e-2
        chosen = compute(rows, weights, workspace)
        assert torch.equal(chosen, few if choice.takes_small(rows[0], 768) else many)
