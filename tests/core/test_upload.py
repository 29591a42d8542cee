"""Micro-batches and small tensors on their way to a device; the CPU stands in for it, by the same code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest
import torch

from antiphon.core.batch import AttentionMetadata, DecodeGroup, MicroBatch, PrefillSlice, RequestSlice, upload

META = torch.device("meta")


def make_part(*, decodes: bool = True, num_prefills: int = 2) -> MicroBatch:
    numbers = iter(range(1, 1000))

    def tensor(*shape: int) -> torch.Tensor:
        return torch.tensor([next(numbers) for _ in range(torch.Size(shape).numel())]).view(shape)

    return MicroBatch(
        lane=1,
        requests=(RequestSlice(request_id=3, token_ids=(7,), context_len=5, block_ids=(2, 4)),),
        token_ids_T=tensor(6),
        positions_T=tensor(6),
        attention=AttentionMetadata(
            slots_T=tensor(6),
            decodes=DecodeGroup(rows_N=tensor(2), block_table_NB=tensor(2, 3), seq_lens_N=tensor(2))
            if decodes
            else None,
            prefills=tuple(
                PrefillSlice(start=n, stop=n + 2, context_len=9, block_ids_B=tensor(n + 1)) for n in range(num_prefills)
            ),
        ),
        rows_by_rank=(6, 0),
    )


def every_tensor(value: object) -> Iterator[torch.Tensor]:
    """All tensors anywhere inside: found without help of the code under test."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from every_tensor(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from every_tensor(item)
    elif isinstance(value, dict):
        yield from every_tensor(list(value.values()))


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("num_prefills", [0, 2])
def test_every_tensor_of_a_micro_batch_moves(decodes: bool, num_prefills: int) -> None:
    part = make_part(decodes=decodes, num_prefills=num_prefills)
    moved = part.to(META)
    tensors, expected = list(every_tensor(moved)), list(every_tensor(part))
    assert len(tensors) == len(expected) == 3 + 3 * decodes + num_prefills
    assert {tensor.device for tensor in tensors} == {META}
    assert [tensor.shape for tensor in tensors] == [tensor.shape for tensor in expected]
    assert (moved.lane, moved.requests, moved.rows_by_rank) == (1, part.requests, (6, 0))
    assert [(p.start, p.stop, p.context_len) for p in moved.attention.prefills] == [
        (p.start, p.stop, p.context_len) for p in part.attention.prefills
    ]
    assert (moved.attention.decodes is None) == (not decodes)


def test_each_tensor_arrives_in_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, but readable."""
    part = make_part()
    monkeypatch.setattr(
        "antiphon.core.batch.upload",
        lambda tensors, device, *, pin_memory: [t.clone() for t in upload(tensors, torch.device("cpu"))],
    )
    moved = part.to(META)
    pairs = list(zip(every_tensor(moved), every_tensor(part), strict=True))
    assert len(pairs) == 8
    for tensor, expected in pairs:
        assert tensor is not expected
        assert torch.equal(tensor, expected)


def test_a_micro_batch_that_is_there_is_left_alone() -> None:
    part = make_part()
    assert part.to(torch.device("cpu")) is part


def test_uploaded_tensors_are_views_of_one_copy() -> None:
    sources = [torch.arange(4), torch.empty(0, dtype=torch.int64), torch.arange(6).view(2, 3).t()]
    results = upload(sources, torch.device("cpu"))
    assert len({result.untyped_storage().data_ptr() for result in results}) == 1
    for source, result in zip(sources, results, strict=True):
        assert torch.equal(source, result)
        source += 100
        assert not result.numel() or not torch.equal(source, result)


def test_tensors_of_several_dtypes_move_together_and_begin_at_multiples_of_16_bytes() -> None:
    given = [
        torch.arange(3, dtype=torch.int32),
        torch.arange(10, 15),
        torch.empty(0, dtype=torch.int32),
        torch.tensor([[0.5, -1.0]], dtype=torch.float64),
        torch.tensor([7], dtype=torch.int32),
        torch.arange(12, dtype=torch.int32).view(3, 4).t(),
    ]
    moved = upload(given, torch.device("cpu"))
    assert [tensor.dtype for tensor in moved] == [tensor.dtype for tensor in given]
    assert all(torch.equal(new, old) for new, old in zip(moved, given, strict=True))
    starts = [new.storage_offset() * new.itemsize for new in moved if new.numel()]
    assert all(start % 16 == 0 for start in starts)
    assert len({new.untyped_storage().data_ptr() for new in moved if new.numel()}) == 1, "one buffer"
