"""Texts in a paged cache in which everything that no text owns is not a number, and their attention by brute force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from antiphon.kernels.attention import AttentionShape

UNUSED = 1 << 20
"""What a block table holds behind the blocks of a text: a block that does not exist."""


def grouped(num_heads: int, num_kv_heads: int, size: int) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads, num_kv_heads=num_kv_heads, key_size=size, value_size=size, scale=size**-0.5, latent=False
    )


def latent(num_heads: int, size: int, rope: int) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=1,
        key_size=size + rope,
        value_size=size,
        scale=(size + rope) ** -0.5,
        latent=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """One step of decoding requests."""

    shape: AttentionShape
    q_NHQ: torch.Tensor
    cache_blocks: torch.Tensor
    block_table_NB: torch.Tensor
    seq_lens_N: torch.Tensor

    def decode(self, backend: Any) -> torch.Tensor:
        prepared = backend.prepare(self.block_table_NB, self.seq_lens_N)
        table_NB, lens_N = self.block_table_NB, self.seq_lens_N
        out: torch.Tensor = backend.decode(self.q_NHQ, self.cache_blocks, table_NB, lens_N, prepared)
        return out

    def some(self, rows: list[int], *, width: int | None = None) -> Texts:
        """Some of the requests, in this order, with a table of another width."""
        table_NB = self.block_table_NB[rows]
        if width is not None:
            wide_NB = table_NB.new_full((len(rows), width), UNUSED)
            wide_NB[:, : min(width, table_NB.shape[1])] = table_NB[:, :width]
            table_NB = wide_NB
        return Texts(
            shape=self.shape,
            q_NHQ=self.q_NHQ[rows],
            cache_blocks=self.cache_blocks,
            block_table_NB=table_NB,
            seq_lens_N=self.seq_lens_N[rows],
        )

    def tame(self) -> Texts:
        """The same with block 0 where the table holds nothing and zeros where the cache does, for other backends."""
        return Texts(
            shape=self.shape,
            q_NHQ=self.q_NHQ,
            cache_blocks=self.cache_blocks.nan_to_num(),
            block_table_NB=self.block_table_NB.masked_fill(self.block_table_NB == UNUSED, 0),
            seq_lens_N=self.seq_lens_N,
        )

    def expected(self) -> torch.Tensor:
        """By brute force in float64, a request at a time: [N, H, V]."""
        lens = self.seq_lens_N.tolist()
        return torch.stack([self.attention(row, self.q_NHQ[row : row + 1], lens[row])[0] for row in range(len(lens))])

    def attention(self, row: int, q_SHQ: torch.Tensor, length: int) -> torch.Tensor:
        """Attention of the last `S` of `length` tokens of one request, in float64: [S, H, V]."""
        shape, num_new = self.shape, len(q_SHQ)
        if length == 0:
            return q_SHQ.new_zeros(num_new, shape.num_heads, shape.value_size, dtype=torch.float64)
        used = -(-length // self.cache_blocks.shape[1])
        tokens_LX = self.cache_blocks[self.block_table_NB[row, :used].long()].flatten(0, 1)[:length].double()
        if shape.latent:
            key_LGQ = tokens_LX.unsqueeze(1)
            value_LGV = key_LGQ[..., : shape.value_size]
        else:
            key_LGQ, value_LGV = tokens_LX.view(length, 2, shape.num_kv_heads, shape.key_size).unbind(1)
        q_SGhQ = q_SHQ.double().view(num_new, shape.num_kv_heads, -1, shape.key_size)
        scores_SGhL = torch.einsum("sghq,lgq->sghl", q_SGhQ, key_LGQ) * shape.scale
        positions_L = torch.arange(length, device=q_SHQ.device)
        hidden_SL = positions_L > positions_L[length - num_new :, None]
        weights = scores_SGhL.masked_fill(hidden_SL[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("sghl,lgv->sghv", weights, value_LGV).flatten(1, 2)


def make_texts(
    shape: AttentionShape,
    lengths: list[int],
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    spare_columns: int = 2,
    seed: int = 1,
) -> Texts:
    """Texts of these lengths, in blocks that are scattered over the cache; block 0 is nobody's."""
    generator = torch.Generator(device).manual_seed(seed)
    num_blocks = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(num_blocks) + 2, generator=generator, device=device) + 1).to(torch.int32)
    table_NB = torch.full((len(lengths), max(num_blocks) + spare_columns), UNUSED, dtype=torch.int32, device=device)
    cache = torch.full((len(order) + 1, block_size, shape.cache_width), float("nan"), dtype=dtype, device=device)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, num_blocks, strict=True)):
        blocks = order[first : first + count]
        table_NB[row, :count] = blocks
        first += count
        positions = torch.arange(length, device=device)
        numbers = torch.randn(length, shape.cache_width, generator=generator, device=device)
        cache[blocks.long()[positions // block_size], positions % block_size] = numbers.to(dtype)
    q_NHQ = torch.randn(len(lengths), shape.num_heads, shape.key_size, generator=generator, device=device)
    return Texts(
        shape=shape,
        q_NHQ=q_NHQ.to(dtype),
        cache_blocks=cache,
        block_table_NB=table_NB,
        seq_lens_N=torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
