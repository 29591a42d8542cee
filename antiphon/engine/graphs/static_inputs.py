"""The inputs of padded steps, at fixed addresses on the device, so that a captured step can be replayed.

    host     numpy over pinned memory: ids, positions, slots, ... of every lane | block tables of the rows in use
      │ one upload a step, on the compute stream
    inbox    the same bytes on the device; the small inputs are read from here
      └────► block tables [max_rows, max_blocks], one copy a lane

There are two pinned buffers, so that the host fills one while the upload of the other may still run. A token id that
the host does not know yet is read from `NewTokens`, by its index there (`sources_T`).

Shapes: `T` rows of a lane, `B` blocks of the longest text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from antiphon.core.batch import (
    PENDING_TOKEN,
    AttentionMetadata,
    Batch,
    DecodeGroup,
    MicroBatch,
    RequestSlice,
)
from antiphon.core.plan import Plan
from antiphon.engine.graphs.block_tables import BlockTables
from antiphon.runtime import Event, Streams

_LONG_FIELDS = ("num_real_1", "token_ids_T", "sources_T", "positions_T", "slots_T")  # int64
_NO_SOURCE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneInputs:
    """The inputs of one lane for `T` rows: views, on the device."""

    num_real_1: torch.Tensor  # int64 [1]; rows from this one on are padding
    token_ids_T: torch.Tensor  # int64
    sources_T: torch.Tensor  # int64, index in `NewTokens.ids_X`, or -1 where `token_ids_T` has the token
    positions_T: torch.Tensor  # int64
    slots_T: torch.Tensor  # int64
    seq_lens_T: torch.Tensor  # int32, 0 for padding
    block_table_TB: torch.Tensor  # int32

    def micro_batch(self, lane: int, token_ids_T: torch.Tensor, num_ranks: int) -> MicroBatch:
        """The micro-batch of a padded step. Which of its rows are real is known on the device only."""
        num_rows = token_ids_T.shape[0]
        return MicroBatch(
            lane=lane,
            requests=(),
            token_ids_T=token_ids_T,
            positions_T=self.positions_T,
            attention=AttentionMetadata(
                slots_T=self.slots_T,
                decodes=DecodeGroup(rows_N=None, block_table_NB=self.block_table_TB, seq_lens_N=self.seq_lens_T),
                prefills=(),
            ),
            rows_by_rank=(num_rows,) * num_ranks,
            num_real_1=self.num_real_1,
        )


class StaticInputs:
    """The inputs of this rank's padded steps.

    rows_by_lane: the most rows of each lane. max_blocks: blocks of the longest text. Results of `fill` and `lane` are
    views of the same memory, valid until the next `fill`, on the compute stream.
    """

    def __init__(self, *, rows_by_lane: Sequence[int], max_blocks: int, block_size: int, streams: Streams) -> None:
        self._block_size = block_size
        self._rows_by_lane = tuple(rows_by_lane)
        self._streams = streams
        num_lanes, most_rows = len(rows_by_lane), max(rows_by_lane[0], sum(rows_by_lane[1:]) + rows_by_lane[-1])
        self._tables = BlockTables(most_rows, max_blocks)
        # Where the small inputs of each lane begin; behind those of the lanes in use come their block tables.
        self._starts = [0, *accumulate(_lane_bytes(rows) for rows in rows_by_lane)]
        size = self._starts[-1] + 4 * most_rows * max_blocks
        pin = streams.owner.pinned_memory
        with torch.inference_mode(False):  # so that they can be used both inside and outside inference mode
            self._inbox = torch.zeros(size, dtype=torch.uint8, device=streams.device)
            self._pinned = [torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=pin) for _ in range(2)]
            self._device_tables = [
                torch.zeros(rows, max_blocks, dtype=torch.int32, device=streams.device) for rows in rows_by_lane
            ]
            self._lanes = [self._views(self._inbox, lane) for lane in range(num_lanes)]
            on_host = [[self._views(pinned, lane) for lane in range(num_lanes)] for pinned in self._pinned]
        self._on_host = [[{name: part.numpy() for name, part in views.items()} for views in lanes] for lanes in on_host]
        self._uploaded: list[Event | None] = [None, None]
        self._num_fills = 0

    def lane(self, lane: int, num_rows: int) -> LaneInputs:
        """The inputs of a lane of `num_rows` rows."""
        views = self._lanes[lane]
        rows = {name: views[name][:num_rows] for name in (*_LONG_FIELDS[1:], "seq_lens_T")}
        return LaneInputs(num_real_1=views["num_real_1"], block_table_TB=self._device_tables[lane][:num_rows], **rows)

    def fill(self, batch: Batch, plan: Plan, sources: Mapping[int, int]) -> list[int]:
        """Write the inputs of a step without prefill. Returns the row of each request, counted over all lanes.

        sources: where to find the new token of a request whose newest token is pending.
        """
        place = self._num_fills % 2
        self._num_fills += 1
        if (uploaded := self._uploaded[place]) is not None:
            uploaded.synchronize()  # of the step before the last one
        rows: list[int] = []
        used_tables: list[tuple[int, int]] = []
        start = 0
        end = head_bytes = self._starts[plan.num_lanes]
        pinned = self._pinned[place].numpy()
        for lane, count in enumerate(plan.part_tokens[batch.rank]):
            requests = batch.requests[start : start + count]
            numbers = self._tables.rows_of(requests)
            width = self._fill_lane(self._on_host[place][lane], requests, numbers, plan.graph, sources)
            on_host = pinned[end : end + 4 * count * width].view(np.int32).reshape(count, width)
            on_host[:] = self._tables.table_NB[numbers, :width]
            rows.extend(range(lane * plan.graph, lane * plan.graph + count))
            used_tables.append((count, width))
            start, end = start + count, end + 4 * count * width
        self._inbox[:end].copy_(self._pinned[place][:end], non_blocking=True)
        self._uploaded[place] = self._streams.record()
        offset = head_bytes
        for lane, (count, width) in enumerate(used_tables):
            if num_bytes := 4 * count * width:
                table_NB = self._inbox[offset : offset + num_bytes].view(torch.int32).view(count, width)
                self._device_tables[lane][:count, :width] = table_NB
                offset += num_bytes
        return rows

    def _fill_lane(
        self,
        views: dict[str, npt.NDArray[np.int64]],
        requests: Sequence[RequestSlice],
        numbers: npt.NDArray[np.int64],
        num_rows: int,
        sources: Mapping[int, int],
    ) -> int:
        """Write the small inputs of one lane. Returns how many columns of the block tables its requests use."""
        count = len(requests)
        views["num_real_1"][0] = count
        for name in (*_LONG_FIELDS[1:], "seq_lens_T"):
            views[name][count:num_rows] = 0
        views["sources_T"][count:num_rows] = _NO_SOURCE
        if not count:
            return 0
        token_ids = [request.token_ids[0] for request in requests]
        contexts = np.fromiter((request.context_len for request in requests), dtype=np.int64, count=count)
        blocks, offsets = np.divmod(contexts, self._block_size)
        views["token_ids_T"][:count] = token_ids
        views["sources_T"][:count] = [
            sources[request.request_id] if token_id == PENDING_TOKEN else _NO_SOURCE
            for request, token_id in zip(requests, token_ids, strict=True)
        ]
        views["positions_T"][:count] = contexts
        views["slots_T"][:count] = self._tables.table_NB[numbers, blocks].astype(np.int64) * self._block_size + offsets
        views["seq_lens_T"][:count] = contexts + 1
        return int(blocks.max()) + 1

    def _views(self, memory: torch.Tensor, lane: int) -> dict[str, torch.Tensor]:
        """The small inputs of a lane at full size, in `memory`."""
        offset, num_rows, views = self._starts[lane], self._rows_by_lane[lane], {}
        for name in _LONG_FIELDS:
            num_bytes = 8 * (1 if name == "num_real_1" else num_rows)
            views[name] = memory[offset : offset + num_bytes].view(torch.int64)
            offset += num_bytes
        views["seq_lens_T"] = memory[offset : offset + 4 * num_rows].view(torch.int32)
        return views


def _lane_bytes(num_rows: int) -> int:
    """Bytes of a lane's small inputs, a multiple of 16."""
    num_bytes = 8 * (1 + (len(_LONG_FIELDS) - 1) * num_rows) + 4 * num_rows
    return -(-num_bytes // 16) * 16
