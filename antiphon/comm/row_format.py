"""The format of a token on the wire: one row of bytes with its hidden state, weights and expert ids.

    | x: D numbers of the model's dtype | weights: K of float32 or float64 | ids: K of int32 | padding |

Row sizes are multiples of 16 bytes, so that every part can be viewed in its own dtype without a copy.
"""

from __future__ import annotations

import torch

from antiphon.comm.tokens import ExpertShape, Routes
from antiphon.core.errors import OptionError
from antiphon.kernels.pack import pack_rows

_ROW_ALIGNMENT = 16


class RowFormat:
    """Offsets of the parts of a row, for one `ExpertShape`."""

    def __init__(self, shape: ExpertShape) -> None:
        self.shape = shape
        self._x_end = aligned(shape.hidden_size * shape.dtype.itemsize, 8)
        self._weights_end = self._x_end + shape.top_k * shape.weight_dtype.itemsize
        self._ids_end = self._weights_end + shape.top_k * 4
        self.row_bytes = aligned(self._ids_end, _ROW_ALIGNMENT)

    def pack(self, rows: torch.Tensor, x_TD: torch.Tensor, routes: Routes) -> None:
        """Write tokens and routes into `rows` [T, row_bytes]; on a GPU, on the current stream."""
        pack_rows(self.x(rows), self.weights(rows), self.ids(rows), x_TD, routes.weights_TK, routes.ids_TK)

    def x(self, rows: torch.Tensor) -> torch.Tensor:
        """The hidden states [N, D] in `rows` [N, row_bytes] of uint8: a view."""
        return rows[:, : self.shape.hidden_size * self.shape.dtype.itemsize].view(self.shape.dtype)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """The routing weights [N, K]: a view."""
        return rows[:, self._x_end : self._weights_end].view(self.shape.weight_dtype)

    def ids(self, rows: torch.Tensor) -> torch.Tensor:
        """The expert ids [N, K] of int32: a view."""
        return rows[:, self._weights_end : self._ids_end].view(torch.int32)


class LaneBuffers:
    """Named buffers of one lane. They only grow, so a size that has been seen before allocates nothing.

    The transport owns the buffers. `get` returns the first rows of one, valid until the next `get` of the same name.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self._frozen = False

    def freeze(self) -> None:
        """Let no buffer grow from now on: captured steps hold the addresses."""
        self._frozen = True

    def get(self, name: str, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor [num_rows, width] of `dtype` with undefined contents.

        Raises `OptionError` if the buffer would have to grow and is frozen.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < num_rows:
            if self._frozen:
                raise OptionError(
                    f"the buffer for {name} would have to grow to {num_rows} rows",
                    limit=f"captured steps hold its address, and it has {0 if buffer is None else buffer.shape[0]}",
                    remedy="run a step of the largest size before the first capture",
                    option="max_tokens",
                )
            with torch.inference_mode(False):  # so that it can be used both inside and outside inference mode
                buffer = torch.empty(num_rows, width, dtype=dtype, device=self._device)
            self._buffers[name] = buffer
        assert buffer.shape[1] == width and buffer.dtype == dtype, f"buffer {name!r} has another shape"
        return buffer[:num_rows]


def aligned(size: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-size // alignment) * alignment
