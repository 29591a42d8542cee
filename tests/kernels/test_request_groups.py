"""Decode attention in groups of requests gives what it gives at once."""

import pytest
import torch

from antiphon.kernels import gqa_attention, mla_attention
from antiphon.kernels.causal_attention import request_groups


@pytest.mark.parametrize(
    ("num_requests", "length", "most", "sizes"),
    [(0, 10, 100, []), (5, 10, 100, [5]), (5, 10, 20, [2, 2, 1]), (3, 1000, 20, [1, 1, 1]), (4, 10, 40, [4])],
)
def test_groups(num_requests: int, length: int, most: int, sizes: list[int]) -> None:
    groups = request_groups(num_requests, length, most)
    assert [group.stop - group.start for group in groups] == sizes
    assert [number for group in groups for number in range(group.start, group.stop)] == list(range(num_requests))


@pytest.mark.parametrize("most_positions", [1, 24, 40])
def test_groups_change_nothing(most_positions: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table = torch.randint(1, 9, (5, 3), generator=generator)
    lengths = torch.tensor([1, 12, 7, 3, 9])
    cache, q = normal(9, 4, 2 * 2 * 8), normal(5, 4, 8)
    whole = gqa_attention.decode_attention(q, cache, table, lengths, 0.3)
    parts = gqa_attention.decode_attention(q, cache, table, lengths, 0.3, most_positions=most_positions)
    torch.testing.assert_close(parts, whole)
    latents, q, key_up, value_up = normal(9, 4, 6 + 4), normal(5, 3, 5 + 4), normal(3, 5, 6), normal(3, 7, 6)
    whole = mla_attention.decode_attention(q, latents, table, lengths, key_up, value_up, 0.3)
    parts = mla_attention.decode_attention(
        q, latents, table, lengths, key_up, value_up, 0.3, most_positions=most_positions
    )
    torch.testing.assert_close(parts, whole)
