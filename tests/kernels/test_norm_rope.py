"""RMS norm and rotary embedding against formulas written out in Python."""

from __future__ import annotations

import math

import pytest
import torch

from antiphon.kernels.norm_rope import apply_rope, rms_norm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm(row: list[float], weights: list[float], eps: float) -> list[float]:
    root = math.sqrt(sum(x * x for x in row) / len(row) + eps)
    return [x * weight / root for x, weight in zip(row, weights, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_rms_norm(size: int, eps: float, dtype: torch.dtype) -> None:
    x_TD, weight_D = randn(5, size, seed=1, dtype=dtype), randn(size, seed=2, dtype=dtype)
    expected = torch.tensor([norm(row, weight_D.tolist(), eps) for row in x_TD.tolist()], dtype=torch.float64)
    out = rms_norm(x_TD, weight_D, eps)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rms_norm_of_bfloat16_is_rounded_once() -> None:
    """Computed in float32: without a weight the only rounding is that of the result."""
    x_TD = randn(50, 64, seed=3, dtype=torch.bfloat16)
    expected = torch.tensor([norm(row, [1.0] * 64, 1e-6) for row in x_TD.tolist()], dtype=torch.float64)
    out = rms_norm(x_TD, torch.ones(64, dtype=torch.bfloat16), 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=1.001 * 2.0**-8, atol=0)
    assert not torch.allclose((x_TD * x_TD.square().mean(1, keepdim=True).rsqrt()).double(), expected, rtol=2.0**-8)


def rotate(row: list[float], angles: list[float], *, interleaved: bool) -> list[float]:
    """First members of all pairs, then second ones."""
    half = len(angles)
    pairs = [(row[2 * i], row[2 * i + 1]) if interleaved else (row[i], row[half + i]) for i in range(half)]
    turned = [
        (a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle))
        for (a, b), angle in zip(pairs, angles, strict=True)
    ]
    return [a for a, _ in turned] + [b for _, b in turned]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("num_pairs", [1, 4])
def test_rope(num_pairs: int, interleaved: bool, dtype: torch.dtype) -> None:
    x_THQ = randn(5, 3, 2 * num_pairs, seed=4, dtype=dtype)
    angles_TP = randn(5, num_pairs, seed=5) * 3
    cos_TP, sin_TP = angles_TP.cos().to(dtype), angles_TP.sin().to(dtype)
    expected = torch.tensor(
        [
            [rotate(row, angles, interleaved=interleaved) for row in rows]
            for rows, angles in zip(x_THQ.tolist(), angles_TP.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    out = apply_rope(x_THQ, cos_TP, sin_TP, interleaved=interleaved)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for head in range(3):
        alone = apply_rope(x_THQ[:, head], cos_TP, sin_TP, interleaved=interleaved)
        assert torch.equal(alone, out[:, head])


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_only(interleaved: bool) -> None:
    """The reason for rotary embedding."""
    query, key = randn(1, 8, seed=6), randn(1, 8, seed=7)
    angles_P = randn(1, 4, seed=8)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            apply_rope(x, (angles_P * at).cos(), (angles_P * at).sin(), interleaved=interleaved)
            for x, at in ((query, query_position), (key, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-9)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)
