"""Attention backends: plain torch and Triton against brute force, the choice of one, and the calls of other libraries.

Without a GPU the Triton kernels are interpreted, in float32: the interpreter's products of bfloat16 are wrong.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from antiphon.core.errors import OptionError
from antiphon.kernels.attention import AttentionShape, choose_backend, find_backend, needs, refusals
from antiphon.kernels.attention.cudnn import CudnnBackend
from antiphon.kernels.attention.flashinfer import FlashInferBackend
from antiphon.kernels.attention.torch_backend import TorchBackend
from antiphon.kernels.attention.triton_backend import TritonBackend
from antiphon.kernels.dispatch import no_cuda_kernels
from antiphon.kernels.fused import attention_items, paged_gqa, paged_latent
from tests.kernels.paged_texts import Texts, grouped, latent, make_texts, relative_error
from tests.support.errors import raises
from tests.support.interpreted import mend_interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
FLOAT32 = torch.float32


@pytest.fixture(autouse=True)
def _mended(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        mend_interpreter(monkeypatch)


CASES = {
    "edges": (grouped(8, 2, 32), 16, [1, 0, 255, 256, 257, 31, 600, 16]),
    "one": (grouped(2, 2, 64), 32, [300]),
    "20-heads-share-one": (grouped(20, 1, 24), 32, [5, 300, 32]),
    "blocks-of-a-chunk": (grouped(4, 4, 16), 256, [5, 256, 300, 513]),
    "blocks-longer-than-a-chunk": (grouped(4, 4, 16), 512, [5, 300, 513, 0]),
    "latents": (latent(16, 64, 16), 16, [1, 0, 256, 257, 31]),
    "odd-latents": (latent(20, 48, 8), 64, [300, 0, 31]),
    "latents-of-many-heads": (latent(40, 32, 16), 16, [1, 512, 513]),
    "latents-of-long-texts": (latent(4, 32, 16), 16, [2049, 2048, 1, 2047, 3100]),
    "latents-in-large-blocks": (latent(16, 32, 16), 512, [600, 5, 0]),
    "nothing": (grouped(4, 2, 16), 16, [0, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_triton_is_right_and_reads_nothing_of_others(case: str) -> None:
    shape, block_size, lengths = CASES[case]
    texts = make_texts(shape, lengths, block_size=block_size, dtype=FLOAT32, device=DEVICE)
    out_NHV = texts.decode(TritonBackend(shape, FLOAT32, block_size, DEVICE))
    torch.testing.assert_close(out_NHV.double(), texts.expected(), rtol=1e-5, atol=1e-5)
    assert out_NHV[texts.seq_lens_N == 0].eq(0).all()


@pytest.mark.parametrize("case", CASES)
def test_torch_is_right(case: str) -> None:
    shape, block_size, lengths = CASES[case]
    texts = make_texts(shape, lengths, block_size=block_size, dtype=torch.float64, device=CPU).tame()
    out_NHV = texts.decode(TorchBackend(shape, torch.float64, block_size, CPU))
    torch.testing.assert_close(out_NHV, texts.expected(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "long"), [(grouped(8, 2, 32), 700), (latent(16, 32, 16), 700), (latent(16, 32, 16), 2100)]
)
def test_bits_depend_neither_on_the_batch_nor_on_the_width_of_the_table(shape: AttentionShape, long: int) -> None:
    texts = make_texts(shape, [long, 3, 513, 256, 90], block_size=16, dtype=FLOAT32, device=DEVICE)
    backend = TritonBackend(shape, FLOAT32, 16, DEVICE)
    together = texts.decode(backend)
    for rows, width in (([2], None), ([0], 140), ([4, 2, 0], 135), ([3, 1], 16)):
        assert torch.equal(texts.some(rows, width=width).decode(backend), together[rows])


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("late_sum", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_every_form_of_the_latent_kernel_is_right(halves: bool, late_sum: bool, ahead: bool) -> None:
    texts = make_texts(latent(20, 48, 8), [300, 0, 31, 64], block_size=16, dtype=FLOAT32, device=DEVICE)
    tiles = replace(paged_latent.FEW_HEADS, halves=halves, late_sum=late_sum, ahead=ahead, positions=64)
    kernel = paged_latent.PagedLatents(
        num_heads=20, latent_size=48, rope_size=8, scale=texts.shape.scale, block_size=16, dtype=FLOAT32,
        device=DEVICE, own_tiles=tiles,
    )  # fmt: skip
    table_NB, lens_N = texts.block_table_NB, texts.seq_lens_N
    items = attention_items.list_items(
        table_NB, lens_N, block_size=16, chunks=kernel.chunks, num_heads=20, value_size=48
    )
    out_NHV = kernel.decode(texts.q_NHQ, texts.cache_blocks, table_NB, lens_N, items)
    torch.testing.assert_close(out_NHV.double(), texts.expected(), rtol=1e-5, atol=1e-5)


def test_grouped_texts_of_both_chunk_sizes_are_right_and_keep_their_bits_alone() -> None:
    shape = grouped(4, 2, 16)
    texts = make_texts(shape, [700, 599, 600, 0, 1300], block_size=16, dtype=FLOAT32, device=DEVICE)
    kernel = paged_gqa.PagedGroups(
        num_heads=4, num_kv_heads=2, head_size=16, scale=0.25, block_size=16, dtype=FLOAT32, device=DEVICE,
        chunks=attention_items.Chunks(short=256, long=512, long_from=600),
    )  # fmt: skip

    def decode(texts: Texts) -> torch.Tensor:
        table_NB, lens_N = texts.block_table_NB, texts.seq_lens_N
        items = attention_items.list_items(
            table_NB, lens_N, block_size=16, chunks=kernel.chunks, num_heads=4, value_size=16
        )
        return kernel.decode(texts.q_NHQ, texts.cache_blocks, table_NB, lens_N, items)

    together = decode(texts)
    torch.testing.assert_close(together.double(), texts.expected(), rtol=1e-5, atol=1e-5)
    for row in (0, 1, 4):
        assert torch.equal(decode(texts.some([row])), together[[row]])


def test_a_prepared_step_is_right_again_after_its_tensors_changed_and_the_plan_ran() -> None:
    """As a replayed graph has it: one set of tensors, other contents."""
    shape = grouped(4, 2, 16)
    backend = TritonBackend(shape, FLOAT32, 16, DEVICE)
    texts = make_texts(shape, [700, 300, 513], block_size=16, dtype=FLOAT32, device=DEVICE)
    for lengths in ([12, 0, 257], [700, 300, 0]):
        texts.seq_lens_N.copy_(torch.tensor(lengths))
        torch.testing.assert_close(texts.decode(backend).double(), texts.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lengths", "span"), [([1000, 40, 700], 1), ([1000, 900, 700], 2), ([3000, 1, 2000], 4)])
def test_items_are_longer_where_there_is_no_memory_for_so_many(lengths: list[int], span: int) -> None:
    """3 texts, and room for 6 chunks more."""
    shape = grouped(4, 2, 16)
    texts = make_texts(shape, lengths, block_size=16, dtype=FLOAT32, device=DEVICE)
    kernel = paged_gqa.PagedGroups(
        num_heads=4, num_kv_heads=2, head_size=16, scale=0.25, block_size=16, dtype=FLOAT32, device=DEVICE
    )
    table_NB, lens_N = texts.block_table_NB, texts.seq_lens_N
    items = attention_items.list_items(
        table_NB, lens_N, block_size=16, chunks=paged_gqa.CHUNKS, num_heads=4, value_size=16, most_positions=6 * 256
    )
    num_items = int(items.first_N1[-1])
    assert num_items <= items.items_X4.shape[0] == 9
    _, begins, ends, _ = items.items_X4[:num_items].T
    assert int((ends - begins).max()) == span * 256
    out_NHV = kernel.decode(texts.q_NHQ, texts.cache_blocks, table_NB, lens_N, items)
    torch.testing.assert_close(out_NHV.double(), texts.expected(), rtol=1e-5, atol=1e-5)


def test_large_items_come_first_and_partial_results_lie_in_order() -> None:
    lens_N = torch.tensor([600, 0, 256, 3, 1500], dtype=torch.int32, device=DEVICE)
    table_NB = torch.zeros(5, 100, dtype=torch.int32, device=DEVICE)
    chunks = attention_items.Chunks(short=256, long=1024, long_from=1500)
    items = attention_items.list_items(table_NB, lens_N, block_size=16, chunks=chunks, num_heads=1, value_size=16)
    assert items.first_N1.tolist() == [0, 3, 3, 4, 5, 7]
    found = [tuple(item) for item in items.items_X4[:7].tolist()]  # request, begin, end, place
    long = [(4, 0, 1024, 5), (4, 1024, 1500, 6)]
    whole = [(0, 0, 256, 0), (0, 256, 512, 1), (2, 0, 256, -1)]
    assert found == [*long, *whole, (0, 512, 600, 2), (3, 0, 3, -1)]


@pytest.mark.parametrize(("length", "most"), [(0, 0), (256, 1), (2047, 8), (2048, 8), (2049, 8), (9000, 9), (9217, 10)])
def test_there_is_room_for_the_chunks_of_any_text_that_is_not_longer(length: int, most: int) -> None:
    chunks = attention_items.Chunks(short=256, long=1024, long_from=2049)
    assert chunks.most(length) == most


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("num_new", [1, 7, 130, 300])
def test_a_slice_attends_to_its_context_in_the_cache(num_new: int, block_size: int) -> None:
    shape = grouped(6, 2, 24)
    texts = make_texts(shape, [300], block_size=block_size, dtype=FLOAT32, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(3)
    q_SHQ = torch.randn(num_new, 6, 24, generator=generator, device=DEVICE)
    backend = TritonBackend(shape, FLOAT32, block_size, DEVICE)
    blocks_B = texts.block_table_NB[0, : -(-300 // block_size)].long()
    out_SHV = backend.attend_context(q_SHQ, texts.cache_blocks, blocks_B, 300)
    torch.testing.assert_close(out_SHV.double(), texts.attention(0, q_SHQ, 300), rtol=1e-5, atol=1e-5)


# ---- the choice


def test_auto_takes_torch_where_there_is_no_gpu_and_says_why() -> None:
    backend, reason = choose_backend("auto", grouped(4, 2, 16), FLOAT32, 16, CPU)
    assert isinstance(backend, TorchBackend)
    assert reason == "not triton: it needs a CUDA device, and the device is cpu"
    assert not backend.takes_context


def test_a_backend_that_is_asked_for_and_cannot_be_used_is_an_error() -> None:
    with raises(OptionError, "attention_backend='triton' cannot be used", "the device is cpu", "use auto or torch"):
        choose_backend("triton", grouped(4, 2, 16), FLOAT32, 16, CPU)
    assert choose_backend("torch", grouped(4, 2, 16), FLOAT32, 16, CPU)[1] == "as requested"


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that could run everything, as far as refusals can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(needs, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 91300))
    return torch.device("cuda", 0)


BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "block_size", "words"),
    [
        ("triton", grouped(32, 4, 128), BFLOAT16, 16, None),
        ("triton", latent(128, 512, 64), BFLOAT16, 64, None),
        ("triton", grouped(32, 4, 128), torch.float64, 16, "float64"),
        ("triton", grouped(32, 4, 128), BFLOAT16, 24, "it is 24"),
        ("triton", grouped(32, 4, 128), BFLOAT16, 8, "it is 8"),
        ("triton", grouped(32, 4, 512), BFLOAT16, 16, "not 512"),
        ("triton", latent(16, 1024, 64), BFLOAT16, 16, "not 1024 + 64"),
        ("flashinfer", grouped(32, 4, 128), BFLOAT16, 16, None),
        ("flashinfer", latent(16, 512, 64), BFLOAT16, 16, None),
        ("flashinfer", latent(16, 256, 64), BFLOAT16, 16, "not 256 + 64"),
        ("flashinfer", grouped(32, 4, 96), BFLOAT16, 16, "not 96"),
        ("flashinfer", grouped(32, 4, 128), FLOAT32, 16, "float32"),
        ("cudnn", grouped(32, 4, 128), BFLOAT16, 16, None),
        ("cudnn", latent(16, 512, 64), BFLOAT16, 16, "latents"),
        ("cudnn", grouped(32, 4, 256), BFLOAT16, 16, "128 numbers at most"),
    ],
)
def test_refusals(
    name: str, shape: AttentionShape, dtype: torch.dtype, block_size: int, words: str | None, a_gpu: torch.device
) -> None:
    refusal = find_backend(name).refusal(a_gpu, shape, dtype, block_size)
    assert refusal is None if words is None else words in (refusal or "")


def test_auto_takes_triton_on_a_gpu_unless_its_kernels_are_switched_off(a_gpu: torch.device) -> None:
    given = (grouped(32, 4, 128), BFLOAT16, 16, a_gpu)
    assert choose_backend("auto", *given)[0].name == "triton"
    with no_cuda_kernels():
        backend, reason = choose_backend("auto", *given)
        assert (backend.name, "switched off" in reason) == ("torch", True)
        assert [name for name, why in refusals(*given).items() if why is None] == ["torch"]


def test_a_missing_package_and_an_old_gpu_are_named(monkeypatch: pytest.MonkeyPatch, a_gpu: torch.device) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    given = (grouped(32, 4, 128), BFLOAT16, 16, a_gpu)
    found = {name: str(why) for name, why in refusals(*given).items()}
    assert "flashinfer-python is not installed" in found["flashinfer"]
    assert "nvidia-cudnn-frontend is not installed" in found["cudnn"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0" in str(refusals(*given)["triton"])


# ---- other libraries, played by modules that compute from what they are given


class FakeWrapper:
    """A stand-in for FlashInfer's wrappers: keeps the plan and computes from it."""

    def __init__(self, workspace: torch.Tensor, layout: str = "", *, use_tensor_cores: bool = False) -> None:
        assert workspace.dtype == torch.uint8
        assert layout in ("", "NHD")

    def plan(self, *given: Any, **options: Any) -> None:
        self.given, self.options = given, options

    def run(self, q: torch.Tensor, *tensors: Any, return_lse: bool = False) -> torch.Tensor:
        outs = []
        if len(tensors) == 1:  # (keys, values), each [num_pages, page_size, G, Q]
            first, ids, last, num_heads, num_kv_heads, size, page_size = self.given
            keys, values = tensors[0]
            scale, new_q = self.options["sm_scale"], q
            lens = [(int(first[n + 1] - first[n]) - 1) * page_size + int(last[n]) for n in range(len(last))]
            assert (num_heads, size) == q.shape[1:]
        else:
            rows, first, ids, lens_N, num_heads, latent_size, rope_size, page_size, causal, scale, *_ = self.given
            assert (latent_size, rope_size, causal) == (q.shape[2], tensors[0].shape[2], False)
            assert rows.tolist() == list(range(len(q) + 1))
            new_q = torch.cat([q, tensors[0]], dim=-1)
            values = tensors[1].unsqueeze(2)
            keys = torch.cat([values, tensors[2].unsqueeze(2)], dim=-1)
            lens, num_kv_heads = lens_N.tolist(), 1
        assert all(tensor.dtype == torch.int32 for tensor in (first, ids))
        assert len(ids) == int(first[-1])
        for n, length in enumerate(lens):
            pages = ids[first[n] : first[n + 1]].long()
            key, value = (x[pages].flatten(0, 1)[:length] for x in (keys, values))
            scores = torch.einsum("ghq,lgq->ghl", new_q[n].view(num_kv_heads, -1, new_q.shape[2]), key) * scale
            outs.append(torch.einsum("ghl,lgv->ghv", scores.softmax(-1), value).flatten(0, 1))
        return torch.stack(outs)


@pytest.mark.parametrize("shape", [grouped(8, 2, 32), latent(4, 16, 8)], ids=["grouped", "latent"])
def test_what_flashinfer_is_given(shape: AttentionShape, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, mla = ModuleType("flashinfer.decode"), ModuleType("flashinfer.mla")
    monkeypatch.setattr(decode, "BatchDecodeWithPagedKVCacheWrapper", FakeWrapper, raising=False)
    monkeypatch.setattr(mla, "BatchMLAPagedAttentionWrapper", FakeWrapper, raising=False)
    for module in (ModuleType("flashinfer"), decode, mla):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    texts = make_texts(shape, [33, 0, 16, 1], block_size=16, dtype=FLOAT32, device=CPU).tame()
    out_NHV = texts.decode(FlashInferBackend(shape, FLOAT32, 16, CPU))
    assert relative_error(out_NHV, texts.expected()) < 1e-6
    assert out_NHV[1].eq(0).all()


class FakeGraph:
    """A stand-in for cuDNN's graph: keeps what the operation was given and computes from it."""

    def __init__(self, **about: Any) -> None:
        self.about, self.steps = about, list[str]()

    def tensor_like(self, tensor: torch.Tensor) -> FakeTensor:
        return FakeTensor(tensor.shape, tensor.stride())

    def sdpa(self, **given: Any) -> tuple[FakeTensor, None]:
        self.operation, self.out = given, FakeTensor(None, None)
        return self.out, None

    def __getattr__(self, name: str) -> Any:
        if name not in ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"):
            raise AttributeError(name)
        return lambda *given: self.steps.append(name)

    def get_workspace_size(self) -> int:
        return 7

    def execute(self, pack: dict[Any, torch.Tensor], workspace: torch.Tensor, handle: Any) -> None:
        assert (len(self.steps), workspace.nbytes) == (5, 7)
        for tensor, given in pack.items():
            assert (tuple(tensor.dim), tuple(tensor.stride)) == (tuple(given.shape), tuple(given.stride()))
        given = self.operation
        q, keys, values, lens, table = (
            pack[given[name]] for name in ("q", "k", "v", "seq_len_kv", "paged_attention_k_table")
        )
        assert (pack[given["seq_len_q"]] == 1).all()
        for n, length in enumerate(lens.flatten().tolist()):
            blocks = table[n].flatten().long()
            key, value = (x[blocks].transpose(1, 2).flatten(0, 1)[:length] for x in (keys, values))
            grouped_q = q[n, :, 0].view(key.shape[1], -1, q.shape[3])
            scores = torch.einsum("ghq,lgq->ghl", grouped_q, key) * given["attn_scale"]
            pack[self.out][n, :, 0] = torch.einsum("ghl,lgv->ghv", scores.softmax(-1), value).flatten(0, 1)


class FakeTensor(SimpleNamespace):
    __hash__ = object.__hash__

    def __init__(self, dim: Any, stride: Any) -> None:
        super().__init__(dim=dim, stride=stride)

    def __eq__(self, other: object) -> bool:
        return self is other

    def set_output(self, is_output: bool) -> FakeTensor:
        return self

    def set_dim(self, dim: list[int]) -> FakeTensor:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> FakeTensor:
        self.stride = stride
        return self


def test_what_cudnn_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[FakeGraph] = []

    def pygraph(**about: Any) -> FakeGraph:
        built.append(FakeGraph(**about))
        return built[-1]

    module = ModuleType("cudnn")
    kinds = SimpleNamespace(BFLOAT16="bf16", HALF="half", FLOAT="float")
    parts = {"pygraph": pygraph, "data_type": kinds, "heur_mode": SimpleNamespace(A=1, FALLBACK=2)}
    for name, part in {**parts, "create_handle": object}.items():
        monkeypatch.setattr(module, name, part, raising=False)
    monkeypatch.setitem(sys.modules, "cudnn", module)
    shape = grouped(8, 2, 32)
    texts = make_texts(shape, [33, 0, 16, 1], block_size=16, dtype=FLOAT32, device=CPU).tame()
    backend = CudnnBackend(shape, FLOAT32, 16, CPU)
    for _ in range(2):
        out_NHV = texts.decode(backend)
        assert relative_error(out_NHV, texts.expected()) < 1e-6
        assert out_NHV[1].eq(0).all()
    texts.some([0, 2]).decode(backend)
    assert len(built) == 2, "one for each number of requests"
