"""Partial sums are added in order of rank and rounded once."""

import pytest
import torch

from antiphon.kernels.pack import add_in_rank_order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_sum(num_ranks: int, dtype: torch.dtype) -> None:
    parts = list(torch.randn(num_ranks, 50, 7, dtype=torch.float64).to(dtype))
    expected = torch.zeros(50, 7, dtype=torch.promote_types(dtype, torch.float32))
    for part in parts:
        expected = expected + part
    result = add_in_rank_order(parts)
    assert torch.equal(result, expected.to(dtype))
    assert result.data_ptr() != parts[0].data_ptr()
