"""`copy-engine`: the slab protocol over peer copies. Needs peer access, over NVLink or PCIe; takes no SMs.

    comm stream      ── after the compute so far ── copies to every peer ── flag 1 in every peer's memory
    compute stream   ── wait for every peer's flag ── flags to 0 ── experts, or the local sum

In a captured step the wait also comes after this rank's own signal. A graph keeps only the order of its edges, and CUDA
may run two branches one after the other: if every rank waited before it signaled, no wait would end. In an eager step
the order of queueing does not matter on separate streams, so it has no such event.

Boxes and flags lie in symmetric memory: | flags | dispatch box, combine box of lane 0 | of lane 1 | ...
"""

from __future__ import annotations

import os
from typing import ClassVar

import torch
import torch.distributed._symmetric_memory as symmetric_memory

from antiphon.comm import needs
from antiphon.comm.device_watch import ALL_PEERS, WatchWord
from antiphon.comm.group import RankGroup, located
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import aligned
from antiphon.comm.slab.mailbox import CommStreams, Exchange, Mailbox, MemoryNames, Phase
from antiphon.comm.slab.transport import SlabTransport
from antiphon.comm.tokens import ExpertShape
from antiphon.device.cuda_stream_memory import StreamMemory, StreamOperations, check_stream_memory_operations
from antiphon.machine.facts import Facts
from antiphon.runtime import CudaStreams, Event

_ALIGNMENT = 512
_SET, _CLEAR = 1, 0


class PeerCopyMailbox(Mailbox):
    """A mailbox in device memory that every rank maps."""

    flag_sets: ClassVar[int] = 1
    """How many words every lane, phase and peer has. A subclass may use the further ones."""

    def __init__(
        self, group: RankGroup, streams: CudaStreams, *, num_lanes: int, dispatch_bytes: int, combine_bytes: int
    ) -> None:
        self._group = group
        self.streams: CommStreams = streams
        self.memory = StreamMemory()
        flush = check_stream_memory_operations(streams.device, "transport copy-engine")
        # NVLink multicast needs permissions that a shared host does not grant, and nothing here uses it.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._set_bytes = aligned(num_lanes * len(Phase) * group.size * 4, _ALIGNMENT)
        flags_end = self.flag_sets * self._set_bytes
        lane_bytes = aligned(dispatch_bytes, _ALIGNMENT) + aligned(combine_bytes, _ALIGNMENT)
        with torch.inference_mode(False):
            self._memory = symmetric_memory.empty(
                flags_end + num_lanes * lane_bytes, dtype=torch.uint8, device=streams.device
            )
        assert group.process_group is not None
        handle = symmetric_memory.rendezvous(self._memory, group.process_group)
        self._bases = [int(address) for address in handle.buffer_ptrs]
        self._memory[:flags_end].zero_()
        torch.cuda.synchronize(streams.device)
        group.all_gather_object("flags are zero")
        self._offsets = [
            [flags_end + lane * lane_bytes, flags_end + lane * lane_bytes + aligned(dispatch_bytes, _ALIGNMENT)]
            for lane in range(num_lanes)
        ]
        self._sizes = sizes = (dispatch_bytes, combine_bytes)
        self._boxes = [[self._memory[start : start + sizes[p]] for p, start in enumerate(s)] for s in self._offsets]
        self._word = group.device_watch().word("compute")
        ways = [(lane, phase) for lane in range(num_lanes) for phase in Phase]
        self._signals = {way: self._make_signal(*way, flush=flush) for way in ways}
        self._waits, self._captured_waits = (
            {way: _Wait(self._flags_of(*way), self._word, captured=captured, flush=flush) for way in ways}
            for captured in (False, True)
        )
        self._signaled: dict[tuple[int, Phase], Event] = {}  # while capturing: behind this rank's own signal

    def box(self, lane: int, phase: Phase) -> torch.Tensor:
        return self._boxes[lane][phase]

    def put(self, exchange: Exchange) -> None:
        stream = self.streams.queue_on("comm", after=self.streams.record())
        offset = self._offsets[exchange.lane][exchange.phase]
        for put in exchange.puts:
            if num_bytes := put.source.numel():
                target, source = self._bases[put.peer] + offset + put.offset, put.source.data_ptr()
                self.memory.copy(target, source, num_bytes, stream)

    def signal(self, exchange: Exchange) -> None:
        way = exchange.lane, exchange.phase
        self.memory.run(self._signals[way], self.streams.queue_on("comm"))
        if self.streams.capturing:
            self._signaled[way] = self.streams.record_on("comm")

    def wait(self, exchange: Exchange) -> None:
        way = exchange.lane, exchange.phase
        if self.streams.capturing:
            self.streams.wait(self._signaled.pop(way))
            wait = self._captured_waits[way]
        else:
            wait = self._waits[way]
        wait.announce(located(exchange.label))
        self.memory.run(wait.operations, self.streams.compute_handle)

    def before_replay(self) -> None:
        self._group.device_watch().next_epoch(self.streams.compute_handle)

    def reset_after_failure(self) -> None:
        self._signaled.clear()

    def describe(self, names: MemoryNames) -> None:
        for lane, offsets in enumerate(self._offsets):
            for phase in Phase:
                names.name_box(self.box(lane, phase).data_ptr(), self._sizes[phase], self._group.rank, lane, phase)
                for rank, base in enumerate(self._bases):
                    names.name_box(base + offsets[phase], self._sizes[phase], rank, lane, phase)
                    for source in range(self._group.size):
                        names.name_flag(self._flag(rank, lane, phase, source), rank, lane, phase, source)

    def _flag(self, rank: int, lane: int, phase: Phase, source: int) -> int:
        return self._bases[rank] + 4 * ((lane * len(Phase) + phase) * self._group.size + source)

    def _flags_of(self, lane: int, phase: Phase) -> dict[int, int]:
        """The address of this rank's flag for every peer."""
        rank = self._group.rank
        return {peer: self._flag(rank, lane, phase, peer) for peer in range(self._group.size) if peer != rank}

    def _make_signal(self, lane: int, phase: Phase, *, flush: bool) -> StreamOperations:
        operations = StreamOperations(flush=flush)
        for step in range(1, self._group.size):
            peer = (self._group.rank + step) % self._group.size
            operations.write(self._flag(peer, lane, phase, self._group.rank), _SET)
        return operations


class _Wait:
    """One batch of operations that waits for every peer's flag and then clears all of them.

    An eager one tells the device watch for which peer it waits. A captured one writes a single code for all of them,
    because each write crosses the bus, and captured exchanges are small.
    """

    def __init__(self, flag_by_peer: dict[int, int], word: WatchWord, *, captured: bool, flush: bool) -> None:
        self._word = word
        self._captured = captured
        self.operations = StreamOperations(flush=flush)
        self._codes: list[tuple[int, int]] = []
        together = captured and len(flag_by_peer) > 1
        if together:
            self._codes.append((self.operations.write(word.address, 0), ALL_PEERS))
        for peer, address in flag_by_peer.items():
            if not together:
                self._codes.append((self.operations.write(word.address, 0), peer))
            self.operations.wait(address, _SET)
        for address in flag_by_peer.values():
            self.operations.write(address, _CLEAR)
        self.operations.write(word.address, 0)

    def announce(self, label: str) -> None:
        """Set the codes by which the batch tells the device watch what it waits for."""
        code = self._word.code(label, captured=self._captured)
        for number, peer in self._codes:
            self.operations.set_value(number, code + peer)


class CopyEngineTransport(SlabTransport):
    """The slab protocol over peer copies by copy engines."""

    name = "copy-engine"
    capture_obstacle = ""
    medium = PeerCopyMailbox

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        missing = (
            *needs.missing_peer_access(facts, world),
            *needs.missing_flags(facts, world),
            *needs.missing_descriptors(facts),
        )
        return needs.gpus(world) or needs.peers(facts, world) or needs.refusal_for(missing)

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        found = needs.links(facts, world)
        return Way(f"peer access between all {world.ranks} GPUs{found}, no SMs")
