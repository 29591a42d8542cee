"""Splits a batch into the micro-batches of a plan, and joins their results.

The metadata of each part is built from its requests; finished metadata is never sliced.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch

from antiphon.core.batch import AttentionMetadata, Batch, DecodeGroup, MicroBatch, PrefillSlice, RequestSlice
from antiphon.core.plan import Plan
from antiphon.splitting.slices import MicroSlice, token_slices
from antiphon.splitting.tensors import join_tensors


def split(batch: Batch, plan: Plan, *, block_size: int) -> list[MicroBatch]:
    """One micro-batch for each lane of the plan. A lane without tokens of this rank gets a dummy."""
    part_tokens = plan.part_tokens[batch.rank]
    assert sum(part_tokens) == batch.num_tokens, f"plan {plan.part_tokens} does not fit {batch.num_tokens} tokens"
    filled = [lane for lane, tokens in enumerate(part_tokens) if tokens > 0]
    slices: dict[int, MicroSlice] = {}
    if filled:
        cuts = list(accumulate(part_tokens[lane] for lane in filled))[:-1]
        slices = dict(zip(filled, token_slices(batch.query_lens, cuts), strict=True))
    return [
        build_micro_batch(
            _requests_of(batch.requests, slices[lane]) if lane in slices else (),
            lane=lane,
            rows_by_rank=plan.rows_by_rank(lane),
            block_size=block_size,
            padded_to=plan.graph,
        )
        for lane in range(plan.num_lanes)
    ]


def join(hidden_parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The hidden states of all lanes [T, D] in the order of the batch."""
    joined: torch.Tensor = join_tensors(list(hidden_parts))
    return joined


def _requests_of(requests: Sequence[RequestSlice], part: MicroSlice) -> tuple[RequestSlice, ...]:
    """The requests of one part. A request that straddles a cut is shortened to its tokens in the part."""
    position = sum(request.query_len for request in requests[: part.request_slice.start])
    chosen = []
    for request in requests[part.request_slice]:
        start = max(part.token_slice.start - position, 0)
        stop = min(part.token_slice.stop - position, request.query_len)
        chosen.append(request.cut(start, stop))
        position += request.query_len
    return tuple(chosen)


def build_micro_batch(
    requests: Sequence[RequestSlice],
    *,
    lane: int,
    rows_by_rank: tuple[int, ...],
    block_size: int,
    padded_to: int = 0,
) -> MicroBatch:
    """Build a micro-batch from slices of requests. Its tensors are on the CPU.

    padded_to: rows of a padded step; rows after the tokens are padding (see `MicroBatch`). 0 for an eager step.
    """
    # Extending arrays by ranges is fast, which matters: a step has thousands of tokens, and the device may be waiting.
    token_ids, positions, slots = array("q"), array("q"), array("q")
    decodes: list[tuple[int, Sequence[int], int]] = []  # row, blocks, sequence length
    prefills: list[PrefillSlice] = []
    for request in requests:
        start = len(token_ids)
        token_ids.extend(request.token_ids)
        positions.extend(range(request.context_len, request.context_len + request.query_len))
        _add_slots(slots, request, block_size)
        if request.query_len == 1:
            decodes.append((start, _used_blocks(request, block_size), request.context_len + 1))
        else:
            prefills.append(
                PrefillSlice(
                    start=start,
                    stop=len(token_ids),
                    context_len=request.context_len,
                    block_ids_B=_int64(_used_blocks(request, block_size)),
                )
            )
    num_tokens = len(token_ids)
    assert not padded_to or num_tokens <= padded_to, f"{num_tokens} tokens in a lane of {padded_to} rows"
    for _ in range(num_tokens, padded_to):
        decodes.append((len(token_ids), (), 0))
        token_ids.append(0)
        positions.append(0)
        slots.append(0)
    return MicroBatch(
        lane=lane,
        requests=tuple(requests),
        token_ids_T=_int64(token_ids),
        positions_T=_int64(positions),
        attention=AttentionMetadata(
            slots_T=_int64(slots),
            decodes=_decode_group(decodes) if decodes else None,
            prefills=tuple(prefills),
        ),
        rows_by_rank=rows_by_rank,
        num_padding=len(token_ids) - num_tokens,
        num_real_1=_int64([num_tokens]) if padded_to else None,
    )


def _add_slots(slots: array[int], request: RequestSlice, block_size: int) -> None:
    position, end = request.context_len, request.context_len + request.query_len
    while position < end:
        block, offset = divmod(position, block_size)
        count = min(block_size - offset, end - position)
        first = request.block_ids[block] * block_size + offset
        slots.extend(range(first, first + count))
        position += count


def _int64(numbers: Iterable[int]) -> torch.Tensor:
    """A new int64 tensor, made through an array: for many numbers several times faster than `torch.tensor`."""
    numbers = numbers if isinstance(numbers, array) else array("q", numbers)
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def _int32(numbers: Iterable[int]) -> torch.Tensor:
    """A new int32 tensor, made as by `_int64`."""
    numbers = numbers if isinstance(numbers, array) else array("i", numbers)
    return torch.frombuffer(numbers, dtype=torch.int32) if numbers else torch.empty(0, dtype=torch.int32)


def _used_blocks(request: RequestSlice, block_size: int) -> Sequence[int]:
    num_tokens = request.context_len + request.query_len
    return request.block_ids[: -(-num_tokens // block_size)]


def _decode_group(decodes: Sequence[tuple[int, Sequence[int], int]]) -> DecodeGroup:
    """decodes: row, blocks and sequence length of each request."""
    width = max(1, *(len(table) for _, table, _ in decodes))
    padded = array("i")
    for _, table, _ in decodes:
        padded.extend(table)
        padded.extend([0] * (width - len(table)))
    return DecodeGroup(
        rows_N=_int64(row for row, _, _ in decodes),
        block_table_NB=_int32(padded).view(len(decodes), width),
        seq_lens_N=_int32(length for _, _, length in decodes),
    )
