"""`one-sided`: the slab protocol over peer access, with a kernel instead of copy engines where exchanges are small.

    compute stream   ── put kernel: slab into every peer's box, then flag ── wait kernel ── experts, or the local sum

A copy-engine exchange has a fixed cost of copies, flags and events that exceeds the time of a small copy. The put
kernel does all of it in one launch. It runs on the compute stream, so it takes SMs and hides nothing: in a step as
small as that there is nothing to compute beside it.

`kernel_path` says which exchanges these are. All others go as in `copy-engine`, which keeps off the SMs throughout.
"""

from __future__ import annotations

from typing import Protocol, Unpack

import torch

from antiphon.comm import needs
from antiphon.comm.group import RankGroup, located
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.slab.copy_engine import CopyEngineTransport, PeerCopyMailbox
from antiphon.comm.slab.kernel_path import KernelMailbox, way_of
from antiphon.comm.slab.mailbox import Exchange, MemoryNames, Phase
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import MadeFor
from antiphon.machine.facts import Facts
from antiphon.runtime import CudaStreams

PUT_BYTES = 1 << 20
"""Default for the largest exchange that goes by kernel: the slabs of all ranks together, in bytes."""

_EPOCH = 1  # the number of a flag that holds an epoch, after those of copy engines
_COUNTER_WORDS = 4  # of int32: each counter is aligned to 16 bytes, so that all ways share their compiled kernels


class Puts(Protocol):
    """The kernels. A recorder may take its place."""

    def put(self, exchange: Exchange, target: int, flag: int) -> None:
        """Store the slabs at the offset `target` of every peer's memory, then flag them at the offset `flag`."""
        ...

    def wait(self, exchange: Exchange, code: int) -> None:
        """Hold the compute stream until every peer has flagged its slab."""
        ...


class OneSidedMailbox(KernelMailbox, PeerCopyMailbox):
    """A mailbox in device memory that every rank maps, and into which kernels put small slabs."""

    flag_sets = 2

    def __init__(
        self, group: RankGroup, streams: CudaStreams, *, num_lanes: int, dispatch_bytes: int, combine_bytes: int
    ) -> None:
        super().__init__(
            group, streams, num_lanes=num_lanes, dispatch_bytes=dispatch_bytes, combine_bytes=combine_bytes
        )
        self._by_kernel = {}
        flags = self._memory[self._set_bytes : 2 * self._set_bytes].view(torch.int32)
        self.puts: Puts = PutKernels(self._bases, flags, rank=group.rank, num_lanes=num_lanes, word=self._word.address)

    def put_by_kernel(self, exchange: Exchange) -> None:
        target = self._offsets[exchange.lane][exchange.phase] + exchange.puts[0].offset
        self.puts.put(exchange, target, self._epoch_flag(exchange.lane, exchange.phase, self._group.rank))

    def wait_by_kernel(self, exchange: Exchange) -> None:
        self.puts.wait(exchange, self._word.code(located(exchange.label), captured=True))

    def describe(self, names: MemoryNames) -> None:
        super().describe(names)
        for lane in range(len(self._offsets)):
            for phase in Phase:
                for rank, base in enumerate(self._bases):
                    for source in range(self._group.size):
                        flag = base + self._epoch_flag(lane, phase, source)
                        names.name_flag(flag, rank, lane, phase, source, _EPOCH)

    def _epoch_flag(self, lane: int, phase: Phase, source: int) -> int:
        """The offset, in every rank's memory, of the flag that `source` sets."""
        return self._set_bytes + self._flag(0, lane, phase, source) - self._bases[0]


class PutKernels:
    """`Puts` by the kernels of `antiphon.kernels.fused.put`, on the current stream, which must be the compute stream.

    bases: the addresses of all ranks' memory. flags: this rank's, int32, [W] for each lane and phase. word: the address
    of the watch's word.
    """

    def __init__(self, bases: list[int], flags: torch.Tensor, *, rank: int, num_lanes: int, word: int) -> None:
        size, device = len(bases), flags.device
        ways = range(num_lanes * len(Phase))
        with torch.inference_mode(False):
            self._bases_W = torch.tensor(bases, dtype=torch.int64, device=device)
            counters = torch.zeros(len(ways), 2, _COUNTER_WORDS, dtype=torch.int32, device=device)
            self._arrived = [counters[way, 0, :1] for way in ways]
            self._epochs = [counters[way, 1, :1] for way in ways]
            self._flags = [flags[way * size : (way + 1) * size] for way in ways]
        self._rank = rank
        self._word = word

    def put(self, exchange: Exchange, target: int, flag: int) -> None:
        from antiphon.kernels.fused.put import put_slabs  # Triton is only there with CUDA

        first = min(exchange.puts, key=lambda put: put.peer)
        num_bytes, way = first.source.numel(), way_of(exchange)
        put_slabs(
            first.source.view(torch.int64),
            self._bases_W,
            self._arrived[way],
            self._epochs[way],
            rank=self._rank,
            first=first.peer,
            step_bytes=0 if exchange.same_source else num_bytes,
            target=target,
            num_bytes=num_bytes,
            flag=flag,
        )

    def wait(self, exchange: Exchange, code: int) -> None:
        from antiphon.kernels.fused.put import wait_for_slabs

        way = way_of(exchange)
        wait_for_slabs(self._flags[way], self._epochs[way], rank=self._rank, word=self._word, code=code)


class OneSidedTransport(CopyEngineTransport):
    """The slab protocol over peer access. put_bytes: the largest exchange that goes by kernel, 0 for none."""

    name = "one-sided"
    capture_obstacle = ""
    medium = OneSidedMailbox

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        refusal = super().refusal(facts, shape, world)
        if refusal is None and facts is not None and facts.versions.triton is None:
            return Refusal("Triton, which compiles its kernels, is missing", "`pip install triton`, or use copy-engine")
        return refusal

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        found = needs.links(facts, world)
        return Way(f"peer access between all {world.ranks} GPUs{found}, SMs only for small exchanges")

    def __init__(self, shape: ExpertShape, *, put_bytes: int = PUT_BYTES, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, **made_for)
        assert isinstance(self.mailbox, OneSidedMailbox)
        self.mailbox.use_kernels(put_bytes)
