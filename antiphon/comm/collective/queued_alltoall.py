"""`alltoall` for devices that queue their work: exact routing, where the host gets the counts one switch later.

    dispatch   tokens packed by destination rank; counts exchanged and copied to the host       (comm stream)
    launch     after the lane's switch, the host waits for the counts and sends the rows        (late launch)
    combine    sums go back the same way; the owner adds them in float32 at least, in rank order

As the host does not know the counts yet, tokens are packed for the worst case: one row for every token and rank, with
the rows to send in front.
"""

from __future__ import annotations

from typing import Unpack

import torch

from antiphon.comm.collective.alltoall import AllToAllTransport, RoutedExchange
from antiphon.comm.group import Work
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import Flight, MadeFor


class QueuedAllToAllTransport(AllToAllTransport):
    """Exact routing over the variable all-to-all of the device's collective backend."""

    capture_obstacle = AllToAllTransport.capture_obstacle

    def __init__(self, shape: ExpertShape, *, max_ctas: int | None = None, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, max_ctas=max_ctas, **made_for)
        num_ranks = self.group.size
        most_rows = num_ranks * self.max_tokens
        for lane in range(self.num_lanes):  # allocated now, so that the remaining memory can be measured
            for name in ("packed", "received"):
                self._rows(name, lane, most_rows)
            for name in ("partials", "home"):
                self._sums(name, lane, most_rows)
        with torch.inference_mode(False):
            pins = self.streams.owner.pinned_memory
            self._counts = [
                torch.zeros(2, num_ranks, dtype=torch.int64, device="cpu", pin_memory=pins)
                for _ in range(self.num_lanes)
            ]

    def send(self, exchange: RoutedExchange, label: str) -> Flight[None]:
        if exchange.received:
            return super().send(exchange, label)
        num_ranks, counts = self.group.size, self._counts[exchange.lane]
        counts_2W = self._buffers[exchange.lane].get("counts", 2, num_ranks, torch.int64)
        counts_2W[0].copy_(exchange.sent_W)
        ready = self.streams.record()
        with self.streams.comm(after=ready):
            ones = [1] * num_ranks
            exchanged = self._link.all_to_all(
                counts_2W[1], counts_2W[0], f"counts of {label}", out_splits=ones, in_splits=ones
            )
            exchanged.wait()
            counts.copy_(counts_2W, non_blocking=True)
            counted = self.streams.record()
        work: Work | None = None

        def launch() -> None:
            nonlocal work
            counted.synchronize()  # the device watch or the backend limits the wait
            exchange.sent, exchange.received = counts.tolist()
            flight.num_bytes = exchange.remote_rows(self.group.rank) * self._format.row_bytes
            work = self._send_rows(exchange, label, after=ready)  # not after what the other lane has queued since

        def wait() -> None:
            assert work is not None
            work.wait()

        flight = Flight(wait=wait, launch=launch, num_messages=2)
        return flight

    def _by_destination(self, reached_TW: torch.Tensor) -> torch.Tensor:
        """The token of every row in the worst case, one for every token and rank, with the rows to send in front."""
        missed_N = ~reached_TW.t().flatten()
        return missed_N.to(torch.uint8).argsort(stable=True) % reached_TW.shape[0]
