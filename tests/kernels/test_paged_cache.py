"""Blocks are gathered by the table, and decoding in groups of requests gives what decoding all at once gives."""

import pytest
import torch

from antiphon.kernels import gqa_attention, mla_attention
from antiphon.kernels.paged_cache import decode_in_groups, gather_blocks


def test_gathering_follows_the_table() -> None:
    cache = torch.randn(5, 4, 3)
    gathered = gather_blocks(cache, torch.tensor([3, 1]), 6)
    assert torch.equal(gathered, torch.cat([cache[3], cache[1][:2]]))
    gathered.fill_(0)
    assert cache[3].abs().sum() > 0


@pytest.mark.parametrize(
    ("num_requests", "num_blocks", "most", "sizes"),
    [(5, 5, 50, [5]), (5, 5, 20, [2, 2, 1]), (3, 500, 20, [1, 1, 1]), (4, 5, 40, [4])],
)
def test_groups(num_requests: int, num_blocks: int, most: int, sizes: list[int]) -> None:
    """Blocks have two places, and each request reads its own block only."""
    found = []

    def decode(q_NHQ: torch.Tensor, gathered_NLX: torch.Tensor, seq_lens_N: torch.Tensor) -> torch.Tensor:
        found.append(q_NHQ.shape[0])
        assert gathered_NLX.shape[1] == 2 * num_blocks
        return q_NHQ + gathered_NLX[:, :1] + seq_lens_N.view(-1, 1, 1)

    numbers_N = torch.arange(num_requests)
    table_NB = numbers_N.unsqueeze(1).expand(-1, num_blocks)
    cache = (100 * numbers_N).view(-1, 1, 1).expand(-1, 2, 1)
    out_NHV = decode_in_groups(decode, numbers_N.view(-1, 1, 1), cache, table_NB, 10 * numbers_N, most)
    assert found == sizes
    assert out_NHV.flatten().tolist() == [111 * number for number in range(num_requests)]


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
    latents, q = normal(9, 4, 6 + 4), normal(5, 3, 6 + 4)
    whole = mla_attention.decode_attention(q, latents, table, lengths, 6, 0.3)
    parts = mla_attention.decode_attention(q, latents, table, lengths, 6, 0.3, most_positions=most_positions)
    torch.testing.assert_close(parts, whole)
