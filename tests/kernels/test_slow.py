"""Whatever is slower on a GPU than it could be says so once; tensors of the CPU that pretend stand for a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from antiphon.core.warn_once import warn_once
from antiphon.kernels import causal_attention as causal_module
from antiphon.kernels import grouped_experts, mla_attention
from antiphon.kernels.causal_attention import causal_attention
from antiphon.kernels.gqa_write import norm_rotate_write
from antiphon.kernels.grouped_experts import grouped_product, grouped_product_reference
from antiphon.kernels.latent_write import norm_rotate_write_latents
from antiphon.kernels.norm_rope import add_rms_norm, apply_rope, rms_norm
from antiphon.kernels.pack import pack_rows

BFLOAT16 = torch.bfloat16


class OnGpu(torch.Tensor):
    """What asks it where it is takes the path for GPUs; it computes on the CPU."""

    is_cuda = True


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> Iterator[None]:
    warn_once.cache_clear()
    grouped_experts._warn_of_loop.cache_clear()
    yield
    grouped_experts._warn_of_loop.cache_clear()


def some(*shape: int, dtype: torch.dtype = BFLOAT16, gpu: bool = True) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return values.as_subclass(OnGpu) if gpu else values


def slots(number: int) -> torch.Tensor:
    return torch.arange(number)


MIXED: dict[str, Callable[[bool], object]] = {
    "rms_norm": lambda gpu: rms_norm(some(3, 8, gpu=gpu), some(8, dtype=torch.float32), 1e-6),
    "add_rms_norm": lambda gpu: add_rms_norm(
        some(3, 8, gpu=gpu), some(3, 8), some(8, dtype=torch.float32, gpu=gpu), 1e-6
    ),
    "apply_rope": lambda gpu: apply_rope(
        some(3, 8, gpu=gpu), some(3, 4, dtype=torch.float32), some(3, 4, dtype=torch.float32), interleaved=False
    ),
    "pack_rows": lambda gpu: pack_rows(
        some(3, 8, dtype=torch.float32, gpu=gpu),
        some(3, 2),
        slots(6).view(3, 2),
        some(3, 8, gpu=gpu),
        some(3, 2),
        slots(6).view(3, 2),
    ),
    "norm_rotate_write": lambda gpu: norm_rotate_write(
        some(3, 16, gpu=gpu),
        some(3, 2, dtype=torch.float32),
        some(3, 2, dtype=torch.float32),
        torch.zeros(1, 16, 8, dtype=BFLOAT16),
        slots(3),
        num_kv_heads=1,
        head_size=4,
        norms=None,
    ),
    "norm_rotate_write_latents": lambda gpu: norm_rotate_write_latents(
        some(3, 12, gpu=gpu),
        some(8, dtype=torch.float32),
        1e-6,
        some(3, 2),
        some(3, 2),
        torch.zeros(1, 16, 12, dtype=torch.float32),
        slots(3),
        interleaved=False,
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes_keep_a_kernel_from_a_gpu_and_that_is_said_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        MIXED[name](True)
    (said,) = caplog.messages
    assert said.startswith(f"{name} runs in plain torch on a GPU, because its tensors are bfloat16 and float32: ")
    assert said.endswith("; use the same dtype for all of them")


@pytest.mark.parametrize("name", MIXED)
def test_on_cpus_plain_torch_is_what_there_is(name: str, caplog: pytest.LogCaptureFixture) -> None:
    MIXED[name](False)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("dtype", "width", "major", "parts"),
    [
        (torch.float32, 16, 9, ["in float32", "use bfloat16 where speed matters"]),
        (BFLOAT16, 12, 9, ["widths are not multiples of 16 bytes", "pad them with zeros"]),
        (BFLOAT16, 16, 8, ["no grouped GEMM for compute capability 8.x", "compute capability 9 or 10"]),
        (BFLOAT16, 16, 12, ["no grouped GEMM for compute capability 12.x"]),
        (BFLOAT16, 16, 9, []),
        (BFLOAT16, 16, 10, []),
    ],
)
def test_experts_that_run_one_by_one_on_a_gpu_are_said_once(
    dtype: torch.dtype,
    width: int,
    major: int,
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(grouped_experts, "major_capability", lambda device: major)
    x_XD, weight_END = some(5, width, dtype=dtype), some(2, 16, width, dtype=dtype, gpu=False)
    ends_E = torch.tensor([2, 5], dtype=torch.int32)
    for _ in range(3):
        found = grouped_product(x_XD, weight_END, ends_E)
    expected = grouped_product_reference(x_XD, weight_END, ends_E)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert len(caplog.messages) == bool(parts)
    for part in [*parts, "the host waits for the device in every layer"] if parts else []:
        assert part in caplog.messages[0]


def test_experts_on_cpus_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for dtype, width in ((torch.float64, 16), (torch.float32, 3)):
        x_XD, weight_END = some(5, width, dtype=dtype, gpu=False), some(2, 16, width, dtype=dtype, gpu=False)
        grouped_product(x_XD, weight_END, torch.tensor([2, 5], dtype=torch.int32))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.float32, "use bfloat16 where speed matters"), (BFLOAT16, "capability 8 or later")]
)
def test_attention_in_pieces_on_a_gpu_is_said_once(
    dtype: torch.dtype, remedy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(causal_module, "can_use_flash_attention", lambda params: False)
    key, value = some(1, 2, 6, 8, dtype=dtype, gpu=False), some(1, 2, 6, 8, dtype=dtype, gpu=False)
    causal_attention(some(1, 2, 6, 8, dtype=dtype), key, value, 1.0)  # no context
    causal_attention(some(1, 2, 3, 8, dtype=dtype, gpu=False), key, value, 1.0)  # no GPU
    assert caplog.messages == []
    for _ in range(3):
        causal_attention(some(1, 2, 3, 8, dtype=dtype), key, value, 1.0)
    (said,) = caplog.messages
    assert "in pieces on a GPU" in said and remedy in said


def test_padded_values_are_said_where_cudnn_would_take_them_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_cudnn = True
    monkeypatch.setattr(mla_attention, "can_use_cudnn_attention", lambda params: has_cudnn)
    monkeypatch.setattr(causal_module, "can_use_flash_attention", lambda params: False)
    up_HXC = some(2, 16, 8)
    mla_attention.prefill_attention(some(1, 3, 2, 12), some(1, 3, 12), up_HXC, 1.0)
    has_cudnn = False
    monkeypatch.setattr(mla_attention, "_causal_padded", lambda q, key, value, scale: value)
    mla_attention.prefill_attention(some(1, 3, 2, 12), some(1, 5, 12), up_HXC, 1.0)  # with context flash is wanted
    assert caplog.messages == []
    for _ in range(2):
        mla_attention.prefill_attention(some(1, 3, 2, 12), some(1, 3, 12), up_HXC, 1.0)
    (said,) = caplog.messages
    assert (
        "cuDNN's attention does not support keys of 12 and values of 8 dimensions here" in said and "2.5 times" in said
    )
