"""Attention kernels on a CUDA device in bfloat16: against float64, bit by bit alone and in a batch, and in graphs."""

from __future__ import annotations

import pytest
import torch

from antiphon.kernels import gqa_attention
from antiphon.kernels.attention import AttentionShape, choose_backend
from antiphon.kernels.attention.triton_backend import TritonBackend
from tests.kernels.paged_texts import Texts, grouped, latent, make_texts, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BFLOAT16 = torch.bfloat16
CUDA = torch.device("cuda", 0)
SHAPES = {
    "qwen3": grouped(32, 4, 128),
    "glm": grouped(96, 8, 128),
    "heads-of-256": grouped(16, 2, 256),
    "heads-of-80": grouped(40, 2, 80),
    "deepseek-lite": latent(16, 512, 64),
    "deepseek": latent(128, 512, 64),
}
EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 0, 0, 3000, 2047, 0]


def make(shape: AttentionShape, block_size: int) -> tuple[Texts, TritonBackend]:
    texts = make_texts(shape, EDGES, block_size=block_size, dtype=BFLOAT16, device=CUDA)
    backend, _ = choose_backend("triton", shape, BFLOAT16, block_size, CUDA)
    assert isinstance(backend, TritonBackend)
    return texts, backend


def assert_right(out_NHV: torch.Tensor, texts: Texts) -> None:
    real = texts.seq_lens_N > 0
    expected = texts.expected()
    assert relative_error(out_NHV[real], expected[real]) < 4e-3
    assert out_NHV[~real].eq(0).all()


@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("name", SHAPES)
def test_right_and_the_same_bits_alone(name: str, block_size: int) -> None:
    texts, backend = make(SHAPES[name], block_size)
    out_NHV = texts.decode(backend)
    assert_right(out_NHV, texts)
    for rows, width in (([7], None), ([22], None), ([18, 3, 23], 300), ([12, 11], 16)):
        assert torch.equal(texts.some(rows, width=width).decode(backend), out_NHV[rows])


@pytest.mark.parametrize("name", ["qwen3", "glm", "deepseek-lite", "deepseek"])
def test_many_more_items_than_programs(name: str) -> None:
    """Every program computes several items, which begin and end anywhere in their texts."""
    lengths = [700 + 61 * number for number in range(64)]
    texts = make_texts(SHAPES[name], lengths, block_size=16, dtype=BFLOAT16, device=CUDA)
    backend, _ = choose_backend("triton", SHAPES[name], BFLOAT16, 16, CUDA)
    out_NHV = texts.decode(backend)
    assert_right(out_NHV, texts)
    for rows in ([0], [63], [40, 3]):
        assert torch.equal(texts.some(rows).decode(backend), out_NHV[rows])


@pytest.mark.parametrize("name", ["qwen3", "deepseek-lite", "deepseek"])
def test_one_graph_serves_other_lengths(name: str) -> None:
    texts, backend = make(SHAPES[name], 16)
    texts.decode(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_NHV = texts.decode(backend)
    for number in range(3):
        lengths = [length * (number + 1) // 4 if (row + number) % 4 else 0 for row, length in enumerate(EDGES)]
        texts.seq_lens_N.copy_(torch.tensor(lengths))
        out_NHV.fill_(float("nan"))
        graph.replay()
        assert_right(out_NHV, texts)


def test_the_host_does_not_wait() -> None:
    texts, backend = make(SHAPES["qwen3"], 16)
    texts.decode(backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        texts.decode(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("num_new", "length"), [(1000, 3003), (128, 128), (77, 2049), (2, 700)])
def test_a_slice_attends_to_its_context_in_the_cache(num_new: int, length: int, block_size: int) -> None:
    """As right as with keys and values gathered, for torch's flash kernel."""
    shape = SHAPES["qwen3"]
    texts = make_texts(shape, [length], block_size=block_size, dtype=BFLOAT16, device=CUDA)
    q_SHQ = torch.randn(num_new, 32, 128, device=CUDA, dtype=BFLOAT16)
    blocks_B = texts.block_table_NB[0, : -(-length // block_size)].long()
    expected = texts.attention(0, q_SHQ, length)
    out_SHV = TritonBackend(shape, BFLOAT16, block_size, CUDA).attend_context(
        q_SHQ, texts.cache_blocks, blocks_B, length
    )
    keys, values = gqa_attention.gather_keys_values(texts.cache_blocks, blocks_B, length, 128)
    gathered = gqa_attention.prefill_attention(q_SHQ.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), shape.scale)[
        0
    ]
    assert relative_error(out_SHV, expected) < max(4e-3, 1.5 * relative_error(gathered, expected))
