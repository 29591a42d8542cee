"""The work of one step on one rank: the batch, and the micro-batches that it is cut into.

This is pure data. The scheduler makes `RequestSlice` and `Batch`. `splitting` makes `MicroBatch` and its
`AttentionMetadata`, always from request slices and never by slicing finished fields, so a cut cannot miss a new field.

Shapes: `T` tokens of a micro-batch, `N` requests that decode one token, `B` KV blocks of a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

PENDING_TOKEN = -1
"""In place of a token id that a step on the device chooses and the host does not know yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSlice:
    """The tokens of one request that one step, or one lane of it, computes."""

    request_id: int
    token_ids: tuple[int, ...]  # new tokens, whose keys and values this step writes; the last may be `PENDING_TOKEN`
    context_len: int  # tokens of the request that are in the KV cache before them
    block_ids: Sequence[int]  # KV blocks of the whole request, in order of position; the owner may append to them

    @property
    def query_len(self) -> int:
        return len(self.token_ids)

    def cut(self, start: int, stop: int) -> RequestSlice:
        """Tokens `start:stop` of this slice; the tokens before them become context."""
        return RequestSlice(
            request_id=self.request_id,
            token_ids=self.token_ids[start:stop],
            context_len=self.context_len + start,
            block_ids=self.block_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The requests and tokens of one step on one rank; empty on an idle rank."""

    rank: int  # the data-parallel replica
    requests: tuple[RequestSlice, ...]

    @property
    def query_lens(self) -> list[int]:
        return [request.query_len for request in self.requests]

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def decode_only(self) -> bool:
        """Whether every request continues by one token; false for an empty batch."""
        return bool(self.requests) and self.num_prefill_tokens == 0

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of requests that do more than continue by one token."""
        return sum(r.query_len for r in self.requests if r.query_len > 1 or r.context_len == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """All single-token slices, computed together."""

    rows_N: torch.Tensor | None  # int64, their rows in the micro-batch, in order; None: all of its rows
    block_table_NB: torch.Tensor  # int32, padded with block 0, which is not read; may be wider than needed
    seq_lens_N: torch.Tensor  # int32, context plus the new token; 0 for padding


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSlice:
    """One slice with several tokens."""

    start: int  # first row in the micro-batch
    stop: int
    context_len: int
    block_ids_B: torch.Tensor  # int64

    @property
    def length(self) -> int:
        """Tokens of the context and of the slice together."""
        return self.context_len + self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """What attention needs to know about one micro-batch."""

    slots_T: torch.Tensor  # int64, where each token's keys and values go: block * block_size + offset
    decodes: DecodeGroup | None
    prefills: tuple[PrefillSlice, ...]
    # set by the model, on its device
    prepared: Any = None  # what the attention backend prepared for `decodes`


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One part of a batch. A part without tokens is a dummy: its peers' experts still need it.

    In a padded step, padding rows follow the real ones. Their keys and values go to block 0, which no request holds,
    their sequence length is 0, and no expert computes them. Their hidden states are meaningless.
    """

    # set by splitting
    lane: int
    requests: tuple[RequestSlice, ...]
    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    attention: AttentionMetadata
    # set by the plan
    rows_by_rank: tuple[int, ...]  # rows of this lane on every rank
    num_padding: int = 0  # padding rows at the end
    num_real_1: torch.Tensor | None = None  # int64 [1]: num_tokens, for kernels; None where no rank pads this lane

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0] - self.num_padding

    def to(self, device: torch.device, *, pin_memory: bool = False) -> MicroBatch:
        """This micro-batch with every tensor on `device`, moved in one copy by `upload`; itself if already there."""
        if self.token_ids_T.device == device:
            return self
        moved: MicroBatch = _with_tensors(self, iter(upload(list(_tensors(self)), device, pin_memory=pin_memory)))
        return moved


# Tensors are found by walking the fields, so that none is forgotten. The data of the requests stays on the host.
_HOLDERS = (MicroBatch, AttentionMetadata, DecodeGroup, PrefillSlice)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, _HOLDERS):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple) and value and isinstance(value[0], _HOLDERS):
        for item in value:
            yield from _tensors(item)


def _with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The value with its tensors replaced, in the order of `_tensors`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, _HOLDERS):
        return replace(value, **{f.name: _with_tensors(getattr(value, f.name), tensors) for f in fields(value)})
    if isinstance(value, tuple) and value and isinstance(value[0], _HOLDERS):
        return tuple(_with_tensors(item, tensors) for item in value)
    return value


_ALIGNMENT = 16

_current: ContextVar[MicroBatch] = ContextVar("antiphon_micro_batch")


def current_micro_batch() -> MicroBatch:
    """The micro-batch that the calling lane runs. Raises `LookupError` outside a forward pass."""
    return _current.get()


@contextmanager
def use_micro_batch(part: MicroBatch) -> Iterator[None]:
    """Make `part` the current micro-batch of this context; a lane has a context of its own."""
    token = _current.set(part)
    try:
        yield
    finally:
        _current.reset(token)


def upload(tensors: Sequence[torch.Tensor], device: torch.device, *, pin_memory: bool = False) -> list[torch.Tensor]:
    """Copy CPU tensors to `device` in one transfer; returns views of one new buffer, in the same order.

    Each of them begins at a multiple of 16 bytes there, so that kernels need no other version for some of them.

    On a GPU the copy is queued on the current stream, and the results are safe on that stream. The sources may be
    changed as soon as the call returns. pin_memory: copy through pinned memory, so that the host need not wait.
    """
    padding, parts, sizes = torch.zeros(_ALIGNMENT, dtype=torch.uint8, device="cpu"), [], []
    for tensor in tensors:
        gap = -tensor.nbytes % _ALIGNMENT
        parts += [tensor.reshape(-1).view(torch.uint8), padding[:gap]]
        sizes.append(tensor.nbytes + gap)
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=pin_memory)
    torch.cat(parts, out=packed)
    # torch's allocator of pinned memory keeps the buffer until the copy is done.
    moved = packed.to(device, non_blocking=True)
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(torch.split(moved, sizes), tensors, strict=True)
    ]
