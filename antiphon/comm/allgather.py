"""`allgather`: every rank gets all tokens, and the partial sums come home by reduce-scatter.

Portable and without counts: only the largest number of tokens of a rank is needed, which the agreement knows. Every
rank pads to it; padding rows carry the expert id -1.

The reduce-scatter is an all-to-all of equal parts, whose receiver adds in float32 at least, in order of rank: as many
bytes, a sum that does not depend on timing, and on gloo faster than its own reduce-scatter (docs/log.md).
"""

from __future__ import annotations

import torch

from antiphon.comm.group import RankGroup
from antiphon.comm.row_format import LaneBuffers, RowFormat
from antiphon.comm.transport import DEFAULT_MAX_TOKENS, ExpertShape, Flight, Routes, Rows, Transport, exchange_counts
from antiphon.runtime import Streams

__all__ = ["AllGatherTransport"]


class AllGatherTransport(Transport):
    """All-gather of tokens, reduce-scatter of partial sums."""

    name = "allgather"

    def __init__(
        self,
        shape: ExpertShape,
        *,
        group: RankGroup,
        streams: Streams,
        num_lanes: int,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        super().__init__(shape, group=group, streams=streams, num_lanes=num_lanes, max_tokens=max_tokens)
        self._format = RowFormat(shape)
        self._buffers = [LaneBuffers(torch.device("cpu")) for _ in range(num_lanes)]
        self._num_tokens = [0] * num_lanes
        self._padded_tokens = [0] * num_lanes

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        if tokens_by_rank is None:
            tokens_by_rank = exchange_counts(self.group, x_TD.shape[0], label)
        num_tokens, padded = x_TD.shape[0], max(tokens_by_rank)
        assert tokens_by_rank[self.group.rank] == num_tokens, f"{tokens_by_rank} is not for {num_tokens} tokens"
        self._num_tokens[lane], self._padded_tokens[lane] = num_tokens, padded
        buffers, row = self._buffers[lane], self._format
        packed = buffers.get("packed", padded, row.row_bytes, torch.uint8)
        row.pack(packed[:num_tokens], x_TD, routes)
        row.ids(packed)[num_tokens:] = -1
        gathered = buffers.get("gathered", padded * self.group.size, row.row_bytes, torch.uint8)

        with self.streams.comm(after=self.streams.record()):
            work = self.group.all_gather(gathered, packed, label)

        def wait() -> Rows:
            work.wait()
            return Rows(row.x(gathered), self.local_ids(row.ids(gathered)), row.weights(gathered))

        num_bytes = (self.group.size - 1) * padded * row.row_bytes
        return Flight(wait=wait, ready_ns=work.ready_ns, num_bytes=num_bytes)

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        hidden_size, dtype = self.shape.hidden_size, self.shape.dtype
        num_tokens, padded = self._num_tokens[lane], self._padded_tokens[lane]
        buffers = self._buffers[lane]
        partials = buffers.get("partials", padded * self.group.size, hidden_size, dtype).copy_(partial_RD)
        home = buffers.get("home", padded * self.group.size, hidden_size, dtype)
        equal = [padded] * self.group.size

        with self.streams.comm(after=self.streams.record()):
            work = self.group.all_to_all(home, partials, label, out_splits=equal, in_splits=equal)

        def wait() -> torch.Tensor:
            work.wait()
            out_TD = torch.zeros(num_tokens, hidden_size, dtype=self.shape.weight_dtype)
            for part in torch.split(home, padded) if padded else ():
                out_TD += part[:num_tokens]
            return out_TD.to(dtype)

        num_bytes = (self.group.size - 1) * padded * hidden_size * dtype.itemsize
        return Flight(wait=wait, ready_ns=work.ready_ns, num_bytes=num_bytes)
