"""The block tables of running requests on the host, one row a request, which keep what earlier steps have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antiphon.core.batch import RequestSlice


@dataclass(slots=True)
class _Row:
    """Where a request's blocks are. blocks: the request's own list, of which the first `num_written` are there."""

    number: int
    blocks: Sequence[int]
    num_written: int = 0


class BlockTables:
    """Rows of block ids, int32 [num_rows, width]. A request keeps its row; only new blocks are written."""

    def __init__(self, num_rows: int, width: int) -> None:
        self.table_NB: npt.NDArray[np.int32] = np.zeros((num_rows, width), dtype=np.int32)
        self._rows: dict[int, _Row] = {}
        self._free = list(range(num_rows - 1, -1, -1))

    def rows_of(self, requests: Sequence[RequestSlice]) -> npt.NDArray[np.int64]:
        """The rows of these requests, brought up to date. At most `num_rows` requests at a time.

        A request that was preempted has a new list of blocks, and is written again.
        """
        found = np.empty(len(requests), dtype=np.int64)
        for place, request in enumerate(requests):
            row = self._rows.get(request.request_id)
            if row is None:
                row = self._rows[request.request_id] = _Row(self._take(requests), request.block_ids)
            elif row.blocks is not request.block_ids:
                row.blocks, row.num_written = request.block_ids, 0
            if row.num_written < len(row.blocks):
                end = len(row.blocks)
                self.table_NB[row.number, row.num_written : end] = row.blocks[row.num_written :]
                row.num_written = end
            found[place] = row.number
        return found

    def _take(self, requests: Sequence[RequestSlice]) -> int:
        """A free row; without one, all requests that are not among these lose theirs."""
        if not self._free:
            here = {request.request_id for request in requests}
            for request_id in [known for known in self._rows if known not in here]:
                self._free.append(self._rows.pop(request_id).number)
        return self._free.pop()
