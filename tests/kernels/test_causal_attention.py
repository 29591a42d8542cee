"""Causal attention with a context: in pieces it is what the formula says, and it never stores a large mask."""

from __future__ import annotations

import sys

import pytest
import torch

from antiphon.kernels import causal_attention as module
from antiphon.kernels.causal_attention import causal_attention, causal_attention_reference


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(num_new: int, length: int, *, num_heads: int = 6, num_kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of two texts; values are shorter than keys."""
    q_NHSQ = normal(2, num_heads, num_new, 8, seed=1)
    key_NGLQ, value_NGLV = normal(2, num_kv_heads, length, 8, seed=2), normal(2, num_kv_heads, length, 5, seed=3)
    return q_NHSQ, key_NGLQ, value_NGLV


def by_the_formula(q_NHSQ: torch.Tensor, key_NGLQ: torch.Tensor, value_NGLV: torch.Tensor) -> torch.Tensor:
    group = q_NHSQ.shape[1] // key_NGLQ.shape[1]
    key_NHLQ, value_NHLV = key_NGLQ.repeat_interleave(group, 1), value_NGLV.repeat_interleave(group, 1)
    context = key_NHLQ.shape[2] - q_NHSQ.shape[2]
    rows = []
    for place in range(q_NHSQ.shape[2]):
        seen = context + place + 1
        scores_NHL = (key_NHLQ[:, :, :seen] @ q_NHSQ[:, :, place, :, None]).squeeze(3) * 0.4
        rows.append((scores_NHL.softmax(-1).unsqueeze(2) @ value_NHLV[:, :, :seen]).squeeze(2))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("num_new", "length"), [(1, 1), (7, 7), (1, 9), (4, 9), (8, 9)])
def test_it_is_the_formula(num_new: int, length: int, num_kv_heads: int) -> None:
    tensors = make(num_new, length, num_kv_heads=num_kv_heads)
    torch.testing.assert_close(causal_attention(*tensors, 0.4), by_the_formula(*tensors))


@pytest.mark.parametrize("num_kv_heads", [2, 6])
@pytest.mark.parametrize("most_masked", [1, 9, 18, 27, 1000])
@pytest.mark.parametrize(("num_new", "length"), [(7, 7), (1, 9), (4, 9), (9, 10)])
def test_pieces_change_nothing(num_new: int, length: int, most_masked: int, num_kv_heads: int) -> None:
    tensors = make(num_new, length, num_kv_heads=num_kv_heads)
    out_NHSV = causal_attention_reference(*tensors, 0.4, most_masked=most_masked)
    torch.testing.assert_close(out_NHSV, by_the_formula(*tensors))


def test_a_stored_mask_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    ones = torch.ones

    def counted(*shape: int, **options: object) -> torch.Tensor:
        sizes.append(shape[0] * shape[1])
        return ones(*shape, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(module.torch, "ones", counted)
    causal_attention_reference(*make(50, 90), 0.4, most_masked=1000)
    assert len(sizes) > 2
    assert max(sizes) <= 1000


def test_torch_compiler_is_not_loaded() -> None:
    """It takes a second and more, in the middle of serving."""
    before = set(sys.modules)
    causal_attention(*make(4, 9), 0.4)
    assert not {name for name in set(sys.modules) - before if name.startswith(("torch._dynamo", "torch._inductor"))}
