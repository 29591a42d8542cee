"""Grouped products against their loop, and the experts of a rank against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from antiphon.kernels.grouped_experts import grouped_experts, grouped_product, grouped_product_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


# ---- products

ROW_COUNTS = {
    "even": [4, 4, 4],
    "uneven": [1, 9, 3],
    "empty-first": [0, 5, 2],
    "empty-last": [5, 2, 0],
    "empty-between": [3, 0, 4],
    "one-expert": [7],
    "single-row": [0, 0, 1, 0],
    "all-empty": [0, 0, 0],
    "many": [3, 0, 1, 17, 0, 0, 5, 2] * 4,
}
SIZES = {
    "16-bytes": (32, 48),
    "odd": (5, 7),
    "odd-input": (9, 16),
    "odd-output": (16, 9),
    "narrow": (1, 1),
    "8-bytes": (12, 20),
}


def product_of(x_XD: torch.Tensor, weight_END: torch.Tensor, counts: list[int]) -> torch.Tensor:
    rows = zip(x_XD.double().split(counts), weight_END.double(), strict=True)
    return torch.cat([x @ weight.t() for x, weight in rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_product_and_its_reference(rows: str, sizes: str, dtype: torch.dtype) -> None:
    counts, (in_size, out_size) = ROW_COUNTS[rows], SIZES[sizes]
    x_XD = randn(sum(counts), in_size, seed=1, dtype=dtype)
    weight_END = randn(len(counts), out_size, in_size, seed=2, dtype=dtype)
    ends_E = torch.tensor(counts).cumsum(0)
    expected = product_of(x_XD, weight_END, counts)
    for product in (grouped_product, grouped_product_reference):
        out_XN = product(x_XD, weight_END, ends_E)
        assert out_XN.shape == (sum(counts), out_size)
        assert out_XN.dtype == dtype
        assert relative_error(out_XN, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_of_views(dtype: torch.dtype) -> None:
    """Rows of a wider buffer and half of a stack of weights, as transports and models pass them."""
    counts = [4, 0, 3]
    x_XD = randn(7, 40, seed=1, dtype=dtype)[:, 8:24]
    weight_END = randn(3, 64, 16, seed=2, dtype=dtype)[:, :32]
    out_XN = grouped_product(x_XD, weight_END, torch.tensor(counts).cumsum(0))
    assert relative_error(out_XN, product_of(x_XD, weight_END, counts)) < TOLERANCE[dtype]


# ---- experts


def naive_experts(
    x_RD: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Token by token in float64."""
    out_RD = torch.zeros(x_RD.shape, dtype=torch.float64)
    for row, ids in enumerate(ids_RK.tolist()):
        for slot, number in enumerate(ids):
            if number >= 0:
                gate, up = (gate_up[number].double() @ x_RD[row].double()).chunk(2)
                out_RD[row] += weights_RK[row, slot].double() * (down[number].double() @ (F.silu(gate) * up))
    return out_RD


def make_experts(num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = randn(num_experts, 2 * width, hidden, seed=3) / hidden**0.5
    down = randn(num_experts, hidden, width, seed=4) / width**0.5
    return gate_up.to(dtype), down.to(dtype)


def make_rows(
    num_rows: int, top_k: int, experts: list[int], hidden: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens; ids out of `experts`, where -1 stands for experts of other ranks."""
    generator = torch.Generator().manual_seed(5)
    order = torch.rand(num_rows, len(experts), generator=generator).argsort(1)[:, :top_k]
    weights_RK = torch.rand(num_rows, top_k, generator=generator, dtype=torch.float64) + 0.1
    wide = torch.promote_types(dtype, torch.float32)
    return randn(num_rows, hidden, seed=6, dtype=dtype), torch.tensor(experts)[order], weights_RK.to(wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "width"), [(32, 16), (19, 13), (16, 9)])
@pytest.mark.parametrize(
    ("num_rows", "top_k", "experts"),
    [
        (20, 3, [0, 1, 2, 3, 4, -1, -1, -1]),
        (9, 4, [0, 1, 2, 3]),
        (6, 2, [2, 3, -1]),
        (1, 1, [4]),
        (5, 2, [-1, -1]),
        (0, 3, [0, 1, 2]),
    ],
    ids=["some-elsewhere", "all-here", "empty-experts", "one-row", "all-elsewhere", "no-rows"],
)
def test_experts(num_rows: int, top_k: int, experts: list[int], hidden: int, width: int, dtype: torch.dtype) -> None:
    gate_up, down = make_experts(5, hidden, width, dtype)
    x_RD, ids_RK, weights_RK = make_rows(num_rows, top_k, experts, hidden, dtype)
    out_RD = grouped_experts(x_RD, ids_RK, weights_RK, gate_up, down)
    assert out_RD.dtype == dtype
    assert out_RD.shape == x_RD.shape
    assert relative_error(out_RD, naive_experts(x_RD, ids_RK, weights_RK, gate_up, down)) < TOLERANCE[dtype]


def test_rows_without_experts_here_are_zero_even_if_they_hold_nan() -> None:
    """Padding of `allgather` is never written."""
    gate_up, down = make_experts(4, 16, 16, torch.float32)
    x_RD, ids_RK, weights_RK = make_rows(6, 2, [0, 1, 2, 3], 16, torch.float32)
    expected = grouped_experts(x_RD, ids_RK, weights_RK, gate_up, down)
    ids_RK[[1, 4]] = -1
    x_RD[[1, 4]] = float("nan")
    weights_RK[[1, 4]] = float("inf")
    out_RD = grouped_experts(x_RD, ids_RK, weights_RK, gate_up, down)
    assert torch.equal(out_RD[[1, 4]], torch.zeros(2, 16))
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(out_RD[kept], expected[kept])


def test_the_sum_over_experts_is_wider_than_the_products() -> None:
    """Two experts of bfloat16 that nearly cancel: their sum keeps what bfloat16 would round away."""
    gate_up, down = make_experts(1, 16, 16, torch.bfloat16)
    gate_up, down = gate_up.repeat(2, 1, 1), torch.cat([down, -down])
    x_RD = randn(8, 16, seed=7, dtype=torch.bfloat16)
    ids_RK = torch.tensor([[0, 1]]).repeat(8, 1)
    weights_RK = torch.tensor([[1.0, 1.0 - 2.0**-12]]).repeat(8, 1)
    out_RD = grouped_experts(x_RD, ids_RK, weights_RK, gate_up, down)
    single = grouped_experts(x_RD, ids_RK[:, :1], weights_RK[:, :1], gate_up, down)
    torch.testing.assert_close(out_RD.float(), single.float() * 2.0**-12, rtol=2e-2, atol=1e-8)


def test_sources_stay_as_they_are() -> None:
    gate_up, down = make_experts(4, 16, 16, torch.float32)
    sources = (*make_rows(6, 2, [0, 1, 2, -1], 16, torch.float32), gate_up, down)
    before = [tensor.clone() for tensor in sources]
    grouped_experts(*sources)
    assert all(map(torch.equal, before, sources))
