"""Latent attention: prefill and absorbed decode against full attention in float64, and against each other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from antiphon.kernels.causal_attention import causal_attention
from antiphon.kernels.mla_attention import (
    _causal_padded,
    _head_groups,
    decode_attention,
    expand_output,
    fold_query,
    prefill_attention,
    write_latents,
)
from antiphon.kernels.paged_cache import gather_blocks

BLOCK_SIZE = 4
NUM_BLOCKS = 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One request: queries and latents of all its tokens, and its blocks."""

    q_SHQ: torch.Tensor
    latents_LC: torch.Tensor
    blocks: list[int]

    @property
    def length(self) -> int:
        return self.latents_LC.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Sizes and up-projections of one layer."""

    num_heads: int
    latent: int
    rope: int
    query: int
    value: int
    dtype: torch.dtype
    key_up_HQC: torch.Tensor
    value_up_HVC: torch.Tensor
    scale: float


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_heads(
    dtype: torch.dtype, *, num_heads: int = 3, latent: int = 11, rope: int = 6, query: int = 5, value: int = 7
) -> Heads:
    return Heads(
        num_heads=num_heads,
        latent=latent,
        rope=rope,
        query=query,
        value=value,
        dtype=dtype,
        key_up_HQC=randn(num_heads, query, latent, seed=1, dtype=dtype),
        value_up_HVC=randn(num_heads, value, latent, seed=2, dtype=dtype),
        scale=0.17,
    )


def make_text(heads: Heads, length: int, *, seed: int, first_block: int) -> Text:
    num_blocks = -(-length // BLOCK_SIZE)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return Text(
        q_SHQ=randn(length, heads.num_heads, heads.query + heads.rope, seed=seed, dtype=heads.dtype),
        latents_LC=randn(length, heads.latent + heads.rope, seed=seed + 100, dtype=heads.dtype),
        blocks=[first_block + number for number in order],
    )


def make_cache(heads: Heads, texts: list[Text], *, filling: float) -> torch.Tensor:
    """A cache with all tokens of the texts in it; every other place holds `filling`."""
    cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, heads.latent + heads.rope), filling, dtype=heads.dtype)
    for text in texts:
        slots = [text.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(text.length)]
        write_latents(cache, torch.tensor(slots), text.latents_LC)
    return cache


def full_attention(heads: Heads, text: Text) -> torch.Tensor:
    """Naive causal attention over expanded keys and values, [S, H, V] in float64."""
    latent_LC = text.latents_LC[:, : heads.latent].double()
    rope_LP = text.latents_LC[:, heads.latent :].double()
    out = torch.zeros(text.length, heads.num_heads, heads.value, dtype=torch.float64)
    for head in range(heads.num_heads):
        keys = torch.cat([latent_LC @ heads.key_up_HQC[head].double().t(), rope_LP], dim=1)
        values = latent_LC @ heads.value_up_HVC[head].double().t()
        for position in range(text.length):
            scores = keys[: position + 1] @ text.q_SHQ[position, head].double() * heads.scale
            out[position, head] = scores.softmax(0) @ values[: position + 1]
    return out


def prefill(heads: Heads, cache: torch.Tensor, text: Text, start: int, stop: int) -> torch.Tensor:
    latents_LC = gather_blocks(cache, torch.tensor(text.blocks[: -(-stop // BLOCK_SIZE)]), stop)
    up_HXC = torch.cat([heads.key_up_HQC, heads.value_up_HVC], dim=1)
    return prefill_attention(text.q_SHQ[start:stop].unsqueeze(0), latents_LC.unsqueeze(0), up_HXC, heads.scale)[0]


def decode(heads: Heads, cache: torch.Tensor, texts: list[Text], positions: list[int]) -> torch.Tensor:
    """One token of each text, in one group; short block tables are padded with block 0."""
    tables = [text.blocks[: position // BLOCK_SIZE + 1] for text, position in zip(texts, positions, strict=True)]
    width = max(map(len, tables))
    q_NHQ = torch.stack([text.q_SHQ[position] for text, position in zip(texts, positions, strict=True)])
    out_NHC = decode_attention(
        fold_query(q_NHQ, heads.key_up_HQC),
        cache,
        torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int32) + 1,
        heads.latent,
        heads.scale,
    )
    return expand_output(out_NHC, heads.value_up_HVC)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filling", [float("nan"), float("inf"), 7.0], ids=str)
def test_a_length_of_0_gives_zeros(dtype: torch.dtype, filling: float) -> None:
    cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, 10), filling, dtype=dtype)
    cache[3] = 0.5
    up_HXC = torch.ones(2, 5, 8, dtype=dtype)
    table_NB, lengths_N = torch.tensor([[0], [3]], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    q_NHX = fold_query(torch.ones(2, 2, 7, dtype=dtype), up_HXC)
    out_NHV = expand_output(decode_attention(q_NHX, cache, table_NB, lengths_N, 8, 0.3), up_HXC[:, :4])
    assert out_NHV[0].eq(0).all()
    assert out_NHV[1].eq(4).all(), "8 times 0.5"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 4, 5, 13])
def test_prefill_is_full_attention(length: int, dtype: torch.dtype) -> None:
    heads = make_heads(dtype)
    text = make_text(heads, length, seed=3, first_block=1)
    cache = make_cache(heads, [text], filling=float("nan"))
    out_SHV = prefill(heads, cache, text, 0, length)
    assert out_SHV.shape == (length, heads.num_heads, heads.value)
    assert out_SHV.dtype == dtype
    assert relative_error(out_SHV, full_attention(heads, text)) < TOLERANCE[dtype]


def test_texts_of_the_same_length_go_together() -> None:
    heads = make_heads(torch.float64)
    texts = [make_text(heads, 6, seed=seed, first_block=1) for seed in (40, 41, 42)]
    up_HXC = torch.cat([heads.key_up_HQC, heads.value_up_HVC], dim=1)
    out_NSHV = prefill_attention(
        torch.stack([text.q_SHQ for text in texts]),
        torch.stack([text.latents_LC for text in texts]),
        up_HXC,
        heads.scale,
    )
    for out_SHV, text in zip(out_NSHV, texts, strict=True):
        assert relative_error(out_SHV, full_attention(heads, text)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("start", "stop"), [(1, 13), (4, 9), (7, 8), (12, 13), (3, 5)])
def test_prefill_after_a_context(start: int, stop: int, dtype: torch.dtype) -> None:
    heads = make_heads(dtype)
    text = make_text(heads, 13, seed=4, first_block=1)
    cache = make_cache(heads, [text], filling=float("nan"))
    expected = full_attention(heads, text)[start:stop]
    assert relative_error(prefill(heads, cache, text, start, stop), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filling", [0.0, float("nan"), float("inf"), float("-inf"), 1e30])
def test_decode_is_full_attention_whatever_lies_in_unused_places(filling: float, dtype: torch.dtype) -> None:
    """Texts of different lengths in one group, so that tables are padded with block 0."""
    heads = make_heads(dtype)
    texts = [
        make_text(heads, length, seed=10 + number, first_block=1 + 5 * number)
        for number, length in enumerate([1, 17, 4, 6])
    ]
    cache = make_cache(heads, texts, filling=filling)
    out_NHV = decode(heads, cache, texts, [text.length - 1 for text in texts])
    assert out_NHV.dtype == dtype
    expected = torch.stack([full_attention(heads, text)[-1] for text in texts])
    assert relative_error(out_NHV, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("filling", [float("nan"), float("inf")])
def test_tokens_behind_the_sequence_do_not_matter(filling: float) -> None:
    """What the same block holds after the last token."""
    heads = make_heads(torch.float64)
    text = make_text(heads, 10, seed=5, first_block=1)
    cache = make_cache(heads, [text], filling=0.0)
    cut_short = cache.clone()
    for position in range(6, 10):
        block = text.blocks[position // BLOCK_SIZE]
        cut_short[block, position % BLOCK_SIZE] = filling
    assert torch.equal(decode(heads, cut_short, [text], [5]), decode(heads, cache, [text], [5]))
    assert torch.equal(prefill(heads, cut_short, text, 2, 6), prefill(heads, cache, text, 2, 6))


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 1, "latent": 1, "rope": 2, "query": 1, "value": 1},
        {"num_heads": 4, "latent": 32, "rope": 8, "query": 16, "value": 16},
        {"num_heads": 2, "latent": 3, "rope": 4, "query": 9, "value": 5},
    ],
    ids=["smallest", "even", "latent-below-query"],
)
def test_decode_and_prefill_agree(sizes: dict[str, int]) -> None:
    heads = make_heads(torch.float64, **sizes)
    text = make_text(heads, 11, seed=6, first_block=1)
    cache = make_cache(heads, [text], filling=float("nan"))
    together = prefill(heads, cache, text, 0, 11)
    alone = torch.cat([decode(heads, cache, [text], [position]) for position in range(11)])
    assert relative_error(alone, together) < TOLERANCE[torch.float64]


def test_writing_touches_only_the_given_slots() -> None:
    cache = randn(3, BLOCK_SIZE, 5, seed=7, dtype=torch.float32)
    before = cache.clone()
    latents = randn(3, 5, seed=8, dtype=torch.float32)
    write_latents(cache, torch.tensor([9, 1, 6]), latents)
    flat, old = cache.flatten(0, 1), before.flatten(0, 1)
    assert torch.equal(flat[[9, 1, 6]], latents)
    others = [slot for slot in range(3 * BLOCK_SIZE) if slot not in (9, 1, 6)]
    assert torch.equal(flat[others], old[others])


@pytest.mark.parametrize(("num_new", "length"), [(5, 5), (3, 7), (1, 9), (1, 1)])
def test_the_form_for_flash_kernels_is_the_same(num_new: int, length: int) -> None:
    """Values padded to the keys, and a mask that need not be stored."""
    q_NHSQ, key_NHLQ, value_NHLV = (
        randn(2, 3, rows, size, seed=seed, dtype=torch.float64)
        for rows, size, seed in ((num_new, 12, 30), (length, 12, 31), (length, 8, 32))
    )
    out = _causal_padded(q_NHSQ, key_NHLQ, value_NHLV, 0.3)
    torch.testing.assert_close(out, causal_attention(q_NHSQ, key_NHLQ, value_NHLV, 0.3))


@pytest.mark.parametrize("context", range(2 * BLOCK_SIZE + 1))
@pytest.mark.parametrize("num_new", [2, 3, BLOCK_SIZE + 1])
def test_every_context_against_the_block_size(context: int, num_new: int) -> None:
    heads = make_heads(torch.float64)
    text = make_text(heads, context + num_new, seed=8, first_block=1)
    cache = make_cache(heads, [text], filling=float("nan"))
    expected = full_attention(heads, text)[context:]
    assert relative_error(prefill(heads, cache, text, context, text.length), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("context", "num_texts"), [(0, 1), (5, 1), (0, 3)])
@pytest.mark.parametrize("most_expanded", [1, 11, 2 * 11, 3 * 11, 3 * 11 * 3])
def test_some_heads_after_the_others_change_nothing(most_expanded: int, context: int, num_texts: int) -> None:
    heads = make_heads(torch.float64)
    texts = [make_text(heads, 11, seed=seed, first_block=1) for seed in range(num_texts)]
    out_NSHV = prefill_attention(
        torch.stack([text.q_SHQ[context:] for text in texts]),
        torch.stack([text.latents_LC for text in texts]),
        torch.cat([heads.key_up_HQC, heads.value_up_HVC], dim=1),
        heads.scale,
        most_expanded=most_expanded,
    )
    for out_SHV, text in zip(out_NSHV, texts, strict=True):
        assert relative_error(out_SHV, full_attention(heads, text)[context:]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("num_heads", "num_positions", "most", "sizes"),
    [
        (128, 8192, 1 << 20, [128]),
        (128, 8193, 1 << 20, [64, 64]),
        (128, 65_536, 1 << 20, [16] * 8),
        (16, 163_840, 1 << 20, [5, 5, 6]),
        (3, 100, 10, [1, 1, 1]),
        (5, 0, 10, [5]),
    ],
)
def test_groups_of_heads(num_heads: int, num_positions: int, most: int, sizes: list[int]) -> None:
    groups = _head_groups(num_heads, num_positions, most)
    assert [group.stop - group.start for group in groups] == sizes
    assert [head for group in groups for head in range(group.start, group.stop)] == list(range(num_heads))
