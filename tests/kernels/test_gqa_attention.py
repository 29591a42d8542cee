"""Grouped-query attention: prefill and paged decode against full attention in float64, and against each other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from antiphon.kernels.gqa_attention import decode_attention, gather_keys_values, prefill_attention, write_keys_values

BLOCK_SIZE = 4
NUM_BLOCKS = 24
SCALE = 0.31
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
HEADS = [(6, 2, 10), (4, 4, 8), (3, 1, 5), (8, 2, 16)]  # query heads, key/value heads, dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One request: queries, keys and values of all its tokens, and its blocks."""

    q_LHQ: torch.Tensor
    key_LGQ: torch.Tensor
    value_LGQ: torch.Tensor
    blocks: torch.Tensor

    @property
    def length(self) -> int:
        return self.q_LHQ.shape[0]

    @property
    def slots(self) -> torch.Tensor:
        places = torch.arange(self.length, device=self.blocks.device)
        return self.blocks[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE


def make_text(
    length: int,
    heads: tuple[int, int, int],
    *,
    seed: int,
    dtype: torch.dtype,
    first_block: int = 1,
    device: str = "cpu",
) -> Text:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, size = heads

    def randn(count: int) -> torch.Tensor:
        return torch.randn(length, count, size, generator=generator, dtype=torch.float64).to(device, dtype)

    blocks = first_block + torch.randperm(-(-length // BLOCK_SIZE), generator=generator)
    return Text(
        q_LHQ=randn(num_heads), key_LGQ=randn(num_kv_heads), value_LGQ=randn(num_kv_heads), blocks=blocks.to(device)
    )


def make_cache(texts: list[Text], *, filling: float = float("nan")) -> torch.Tensor:
    """A cache with all tokens of the texts in it; every other place holds `filling`."""
    key_LGQ = texts[0].key_LGQ
    width = 2 * key_LGQ.shape[1] * key_LGQ.shape[2]
    cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, width), filling, dtype=key_LGQ.dtype, device=key_LGQ.device)
    for text in texts:
        write_keys_values(cache, text.slots, text.key_LGQ, text.value_LGQ)
    return cache


def attend(q_SHQ: torch.Tensor, key_LGQ: torch.Tensor, value_LGQ: torch.Tensor) -> torch.Tensor:
    """Prefill of one request."""
    return prefill_attention(q_SHQ.unsqueeze(0), key_LGQ.unsqueeze(0), value_LGQ.unsqueeze(0), SCALE)[0]


def full_attention(text: Text) -> torch.Tensor:
    """[L, H, Q] by the formula, in float64, one query head after the other."""
    q_LHQ, key_LGQ, value_LGQ = (x.cpu().double() for x in (text.q_LHQ, text.key_LGQ, text.value_LGQ))
    length, num_heads, _ = q_LHQ.shape
    later_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
    out_LHQ = torch.empty_like(q_LHQ)
    for head in range(num_heads):
        shared = head * key_LGQ.shape[1] // num_heads
        scores_LL = (q_LHQ[:, head] @ key_LGQ[:, shared].t() * SCALE).masked_fill(later_LL, float("-inf"))
        out_LHQ[:, head] = scores_LL.softmax(-1) @ value_LGQ[:, shared]
    return out_LHQ


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert float((actual.cpu().double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("context", [0, 1, 6, 12])
def test_prefill(heads: tuple[int, int, int], context: int, dtype: torch.dtype) -> None:
    text = make_text(13, heads, seed=1, dtype=dtype)
    out = attend(text.q_LHQ[context:], text.key_LGQ, text.value_LGQ)
    assert_near(out, full_attention(text)[context:], dtype)


@pytest.mark.parametrize("context", [0, 6])
def test_prefill_of_several_requests(context: int) -> None:
    texts = [make_text(13, (6, 2, 10), seed=seed, dtype=torch.float64) for seed in range(3)]
    q, key, value = (torch.stack([getattr(text, name) for text in texts]) for name in ("q_LHQ", "key_LGQ", "value_LGQ"))
    out = prefill_attention(q[:, context:], key, value, SCALE)
    assert_near(out, torch.stack([full_attention(text)[context:] for text in texts]), torch.float64)


@pytest.mark.parametrize("context", [0, 6])
def test_prefill_of_views_of_one_tensor(context: int) -> None:
    """Projections come as views with gaps between their rows."""
    text = make_text(13, (6, 2, 10), seed=1, dtype=torch.float64)
    joint = torch.cat([text.q_LHQ, text.key_LGQ, text.value_LGQ], dim=1).flatten(1)
    q, key, value = (part.unflatten(1, (-1, 10)) for part in joint.split([60, 20, 20], dim=1))
    assert not key.is_contiguous()
    assert_near(attend(q[context:], key, value), full_attention(text)[context:], torch.float64)


@pytest.mark.parametrize("context", range(2 * BLOCK_SIZE + 1))
@pytest.mark.parametrize("num_new", [2, 3, BLOCK_SIZE + 1])
def test_every_context_against_the_block_size(context: int, num_new: int) -> None:
    text = make_text(context + num_new, (6, 2, 10), seed=2, dtype=torch.float64)
    key_LGQ, value_LGQ = gather_keys_values(make_cache([text]), text.blocks, text.length, 10)
    assert_near(attend(text.q_LHQ[context:], key_LGQ, value_LGQ), full_attention(text)[context:], torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_gathered(dtype: torch.dtype) -> None:
    texts = [make_text(length, (6, 2, 10), seed=length, dtype=dtype, first_block=1 + length) for length in (3, 9)]
    cache = make_cache(texts)
    for text in texts:
        key_LGQ, value_LGQ = gather_keys_values(cache, text.blocks, text.length, 10)
        assert torch.equal(key_LGQ, text.key_LGQ)
        assert torch.equal(value_LGQ, text.value_LGQ)
    assert int(cache.isnan().any(-1).sum()) == NUM_BLOCKS * BLOCK_SIZE - 12


@pytest.mark.parametrize("filling", [float("nan"), float("inf"), 7.0], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode(heads: tuple[int, int, int], dtype: torch.dtype, filling: float) -> None:
    """Texts of different lengths at once: behind them, and in the padding, may be anything. Length 0 gives zeros."""
    texts = [
        make_text(length, heads, seed=length, dtype=dtype, first_block=first)
        for length, first in [(1, 1), (4, 2), (9, 3), (14, 6)]
    ]
    alone_HQ = decode_attention(
        texts[0].q_LHQ[-1:], make_cache(texts, filling=filling), torch.tensor([[0]]), torch.tensor([0]), SCALE
    )
    assert torch.equal(alone_HQ, torch.zeros_like(alone_HQ))
    width = max(len(text.blocks) for text in texts)
    table = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in zip(table, texts, strict=True):
        row[: len(text.blocks)] = text.blocks
    out = decode_attention(
        torch.stack([text.q_LHQ[-1] for text in texts]),
        make_cache(texts, filling=filling),
        table,
        torch.tensor([text.length for text in texts]),
        SCALE,
    )
    assert_near(out, torch.stack([full_attention(text)[-1] for text in texts]), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [0, 6, 36])
def test_on_the_device(context: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    text = make_text(40, (8, 2, 64), seed=3, dtype=dtype, device="cuda")
    expected = full_attention(text)
    out = attend(text.q_LHQ[context:], text.key_LGQ, text.value_LGQ)
    assert_near(out, expected[context:], dtype)
    decoded = decode_attention(
        text.q_LHQ[-1:], make_cache([text]), text.blocks.unsqueeze(0), torch.tensor([40], device="cuda"), SCALE
    )
    assert_near(decoded, expected[-1:], dtype)
