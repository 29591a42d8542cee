"""`shared-memory`: the slab protocol on the CPUs of one host. Each rank writes into its peers' boxes.

It runs the protocol of the GPU transports between real processes, on any machine. The calling thread does the copies,
so only waits for late peers can be hidden.

Memory of a rank: | flags | dispatch box, combine box of lane 0 | of lane 1 | ...
A flag is two 64-bit words: 1 once the slab is complete, and the time at which it was. One thread stores the copy, the
time and the flag in this order. A processor with total store order (x86-64) shows them to others in the same order; on
other processors the interpreter's own locks stand between the stores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from antiphon.comm import needs
from antiphon.comm.group import RankGroup
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import aligned
from antiphon.comm.slab.host_memory import share_host_memory
from antiphon.comm.slab.mailbox import Exchange, Mailbox, MemoryNames, Phase
from antiphon.comm.slab.transport import SlabTransport
from antiphon.comm.tokens import ExpertShape
from antiphon.machine.facts import Facts
from antiphon.runtime import Streams

_FLAG_WORDS = 2
_ALIGNMENT = 256


Words = np.ndarray[Any, Any]
"""The 64-bit flag words of one rank."""


class FlaggedMemory:
    """A rank's operations on memory that others map. A recorder may take its place."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def set_flag(self, words: Words, number: int) -> None:
        words[number + 1] = time.perf_counter_ns()
        words[number] = 1

    def arrival_ns(self, words: Words, number: int) -> int:
        """When a flag was set. Valid only after waiting for it."""
        return int(words[number + 1])

    def clear_flag(self, words: Words, number: int) -> None:
        words[number] = 0


class SharedMemoryMailbox(Mailbox):
    """A mailbox in host memory that every rank maps."""

    def __init__(
        self, group: RankGroup, streams: Streams, *, num_lanes: int, dispatch_bytes: int, combine_bytes: int
    ) -> None:
        self._group = group
        sizes = (dispatch_bytes, combine_bytes)
        flag_words = num_lanes * len(Phase) * group.size * _FLAG_WORDS
        flags_end = aligned(flag_words * 8, _ALIGNMENT)
        lane_bytes = sum(aligned(size, _ALIGNMENT) for size in sizes)
        memories = share_host_memory(group, flags_end + num_lanes * lane_bytes, what="transport shared-memory")
        self._flags = [memory[: flag_words * 8].view(torch.int64).numpy() for memory in memories]
        starts = [flags_end + lane * lane_bytes for lane in range(num_lanes)]
        offsets = (0, aligned(dispatch_bytes, _ALIGNMENT))
        self._boxes = [
            [[memory[start + offsets[phase] :][: sizes[phase]] for phase in Phase] for start in starts]
            for memory in memories
        ]
        self._arrived_ns = [[0, 0] for _ in range(num_lanes)]
        self.memory = FlaggedMemory()

    def box(self, lane: int, phase: Phase) -> torch.Tensor:
        return self._boxes[self._group.rank][lane][phase]

    def put(self, exchange: Exchange) -> None:
        for put in exchange.puts:
            box = self._boxes[put.peer][exchange.lane][exchange.phase]
            self.memory.copy(box[put.offset : put.offset + put.source.numel()], put.source)

    def signal(self, exchange: Exchange) -> None:
        word = self._word(exchange.lane, exchange.phase, self._group.rank)
        for put in exchange.puts:
            self.memory.set_flag(self._flags[put.peer], word)

    def wait(self, exchange: Exchange) -> None:
        flags = self._flags[self._group.rank]
        arrived_ns = 0
        for arrival in exchange.arrivals:
            word = self._word(exchange.lane, exchange.phase, arrival.peer)
            if flags[word] == 0:
                self._group.wait_until(partial(_is_set, flags, word), exchange.label, peer=arrival.peer)
            arrived_ns = max(arrived_ns, self.memory.arrival_ns(flags, word))
        self._arrived_ns[exchange.lane][exchange.phase] = arrived_ns

    def reset(self, exchange: Exchange) -> None:
        flags = self._flags[self._group.rank]
        for arrival in exchange.arrivals:
            self.memory.clear_flag(flags, self._word(exchange.lane, exchange.phase, arrival.peer))

    def ready_ns(self, exchange: Exchange) -> Callable[[], int | None] | None:
        return lambda: self._arrived_ns[exchange.lane][exchange.phase] or None

    def describe(self, names: MemoryNames) -> None:
        for rank, boxes in enumerate(self._boxes):
            for lane, lane_boxes in enumerate(boxes):
                for phase in Phase:
                    names.name_box(lane_boxes[phase].data_ptr(), lane_boxes[phase].numel(), rank, lane, phase)
                    for source in range(self._group.size):
                        address = flag_address(self._flags[rank], self._word(lane, phase, source))
                        names.name_flag(address, rank, lane, phase, source)

    def _word(self, lane: int, phase: Phase, source: int) -> int:
        return ((lane * len(Phase) + phase) * self._group.size + source) * _FLAG_WORDS


class SharedMemoryTransport(SlabTransport):
    """The slab protocol through the shared memory of one host, on CPUs."""

    name = "shared-memory"
    capture_obstacle = "the host itself copies slabs and waits for flags"
    medium = SharedMemoryMailbox

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        if world.device.own_memory:
            return Refusal("needs CPUs, and the ranks run on GPUs", "use host-staged")
        # Only pages that are written take memory, so no size is required unless the caller names one.
        missing = needs.missing_shared_memory(facts, world.host_bytes or 0)
        return needs.peers(facts, world) or needs.refusal_for(missing)

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        return Way("memory that the processes of this host share")


def flag_address(words: Words, number: int) -> int:
    """The address of a flag in this process."""
    return int(words.ctypes.data) + words.itemsize * number


def _is_set(words: Words, number: int) -> bool:
    return bool(words[number] != 0)
