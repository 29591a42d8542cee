"""The kernels of `host-staged`, which carry small exchanges through the pinned memory that all ranks map."""

from __future__ import annotations

from typing import Protocol

import torch

from antiphon.comm.slab.kernel_path import way_of
from antiphon.comm.slab.mailbox import Exchange, Phase
from antiphon.kernels.slices import MAX_SLICES

NUM_PROGRAMS = 16
"""The most programs that send, and the most that receive: of 8, 16, 32 and 64 the best up to 64 tokens.

Each takes a part of an SM as long as the exchange lasts."""


class HostKernels(Protocol):
    """The kernels. A recorder may take its place."""

    def exchange(
        self, exchange: Exchange, box: torch.Tensor, *, target: int, target_step: int, flag: int, code: int
    ) -> None:
        """Send this rank's slabs and receive the peers'.

        box: this rank's. target: the offset of a rank's slabs in its host memory, that for rank 0 first, in steps of
        `target_step`. flag: the offset of the reader's flags. code: for the device watch.
        """
        ...


class LaunchedHostKernels:
    """`HostKernels` on the current stream, which must be the compute stream.

    bases: the addresses of all ranks' host memory, as the device sees them. word: the address of the watch's word.
    """

    def __init__(self, bases: list[int], device: torch.device, *, rank: int, num_lanes: int, word: int) -> None:
        ways = num_lanes * len(Phase)
        with torch.inference_mode(False):
            self._bases_W = torch.tensor(bases, dtype=torch.int64, device=device)
            counts = torch.zeros(ways, 2, len(bases) - 1, MAX_SLICES, dtype=torch.int32, device=device)
            self._sent, self._received = ([counts[way, end] for way in range(ways)] for end in range(2))
        self._rank = rank
        self._word = word
        self.num_programs = NUM_PROGRAMS

    def exchange(
        self, exchange: Exchange, box: torch.Tensor, *, target: int, target_step: int, flag: int, code: int
    ) -> None:
        from antiphon.kernels.fused.host_exchange import exchange_slabs  # Triton is only there with CUDA

        way, num_bytes = way_of(exchange), exchange.slab_bytes
        put = min(exchange.puts, key=lambda put: put.peer)
        arrival = min(exchange.arrivals, key=lambda arrival: arrival.peer)
        exchange_slabs(
            put.source.view(torch.int64),
            box[arrival.offset : arrival.offset + num_bytes].view(torch.int64),
            self._bases_W,
            self._sent[way],
            self._received[way],
            rank=self._rank,
            first=put.peer,
            num_bytes=num_bytes,
            same_source=exchange.same_source,
            target=target,
            target_step=target_step,
            flag=flag,
            word=self._word,
            code=code,
            num_programs=self.num_programs,
        )
