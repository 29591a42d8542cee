"""`host-staged`: the slab protocol through pinned host memory, for servers without peer access.

Each rank has memory that all ranks map: | flags | its outgoing slabs, lane by lane |. Slabs travel in chunks, so that a
peer downloads the first one while the next is still being uploaded; copy engines work in both directions at once, and
take no SMs.

    up stream        ── chunk 0 to own memory ── flag at every peer ── chunk 1 ── flag ── ...
    down stream      ── wait for a peer's chunk 0, flag to 0 ── chunk 0 to own box ── ...   (queued at once, not after
                                                                                             this rank's compute)
    compute stream   ── waits for the down stream

In a captured step the down stream waits for a peer's chunk only after this rank has signaled its own chunk of that
number. `copy_engine` says why: CUDA may run the branches of a graph one after the other.

A slab that goes to all peers (dispatch) is uploaded once. A chunk's flag lies in the memory of the rank that waits for
it.

Small exchanges go by one kernel on the compute stream, which uploads, waits and downloads (`kernel_path`).
`antiphon.kernels.fused.host_exchange` explains it. It uses the same slabs with flags of its own:
| flags of copies | epochs of kernels | slabs |.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Unpack

import torch

from antiphon.comm import needs
from antiphon.comm.device_watch import ALL_PEERS
from antiphon.comm.group import RankGroup, located
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.row_format import aligned
from antiphon.comm.slab.host_kernels import HostKernels, LaunchedHostKernels
from antiphon.comm.slab.host_memory import share_host_memory
from antiphon.comm.slab.kernel_path import KernelMailbox
from antiphon.comm.slab.mailbox import CommStreams, Exchange, Mailbox, MemoryNames, Phase
from antiphon.comm.slab.transport import SlabTransport, slab_bytes
from antiphon.comm.tokens import ExpertShape
from antiphon.comm.transport import MadeFor
from antiphon.device.cuda_stream_memory import (
    Replay,
    StreamMemory,
    StreamOperations,
    check_stream_memory_operations,
    register_host_memory,
    unregister_host_memory,
)
from antiphon.kernels.slices import LARGEST_SLAB, MAX_SLICES
from antiphon.machine.advice import for_docker, format_bytes
from antiphon.machine.facts import Facts
from antiphon.runtime import CudaStreams, Event

PUT_BYTES = 640 << 10
"""Default for the largest exchange that goes by kernel: the slabs of all ranks together, in bytes.

On 2 x H100 with PCIe 5 kernels were faster than copies up to 64 tokens of 4,160 bytes, and slower from 128 on."""

_ALIGNMENT = 4096
_SET, _CLEAR = 1, 0
_USES_BEFORE_REPLAY = 2
_MAX_CHUNKS = 8
_SMALLEST_CHUNK = 1 << 20
_CHUNK_ALIGNMENT = 4096


class Chunk(NamedTuple):
    """Bytes `start` to `start + num_bytes` of a slab."""

    start: int
    num_bytes: int


def chunks_of(num_bytes: int) -> list[Chunk]:
    """Cut a slab, the same way on both ends: at most 8 chunks; below 2 MiB a single one, which may be empty."""
    count = max(1, min(_MAX_CHUNKS, num_bytes // _SMALLEST_CHUNK))
    size = aligned(-(-num_bytes // count), _CHUNK_ALIGNMENT) or 1
    starts = range(0, num_bytes, size) if num_bytes else (0,)
    return [Chunk(start, min(size, num_bytes - start)) for start in starts]


class HostStagedMailbox(Mailbox):
    """A mailbox in host memory that every rank maps and pins, by copy engines."""

    num_epochs: ClassVar[int] = 0
    """How many words every lane, phase and peer has besides the flags of copies. A subclass may use them."""

    def __init__(
        self, group: RankGroup, streams: CudaStreams, *, num_lanes: int, dispatch_bytes: int, combine_bytes: int
    ) -> None:
        self._group = group
        self.streams: CommStreams = streams
        self.memory = StreamMemory()
        flush = check_stream_memory_operations(streams.device, "transport host-staged")
        ways = num_lanes * len(Phase) * group.size
        self._epochs_start = aligned(ways * _MAX_CHUNKS * 4, _ALIGNMENT)
        flags_end = self._epochs_start + aligned(ways * self.num_epochs * 4, _ALIGNMENT)
        # Outgoing slabs: in dispatch one for all peers, in combine one for each.
        dispatch_slab, combine_slab = dispatch_bytes // group.size, combine_bytes // group.size
        self._slab_bytes = (aligned(dispatch_slab, _ALIGNMENT), aligned(combine_slab, _ALIGNMENT))
        lane_bytes = self._slab_bytes[0] + group.size * self._slab_bytes[1]
        what = "transport host-staged"
        self._memories = share_host_memory(group, flags_end + num_lanes * lane_bytes, what=what)
        self._bases = [0] * group.size
        self._bases[group.rank] = register_host_memory(self._memories[group.rank], what)
        group.all_gather_object("own memory is pinned")  # so that the owner touches its memory first
        for peer in range(group.size):
            if peer != group.rank:
                self._bases[peer] = register_host_memory(self._memories[peer], what)
        # Unpin before the mappings go, but not at exit, when a stream may still wait forever.
        weakref.finalize(self, unregister_host_memory, self._memories).atexit = False
        self._lane_starts = [flags_end + lane * lane_bytes for lane in range(num_lanes)]
        with torch.inference_mode(False):
            self._boxes = [
                [
                    torch.empty(size, dtype=torch.uint8, device=streams.device)
                    for size in (dispatch_bytes, combine_bytes)
                ]
                for _ in range(num_lanes)
            ]
        torch.cuda.synchronize(streams.device)  # until earlier users of the boxes' memory are done with it
        group.all_gather_object("boxes are ready")
        self._word = group.device_watch().word("down")
        self._arrived: list[list[Event | None]] = [[None, None] for _ in range(num_lanes)]
        self._signals: dict[tuple[int, ...], StreamOperations] = {}
        self._waits: dict[tuple[int, int, int, int], StreamOperations] = {}
        self._flush = flush
        self._waiting, self._done = StreamOperations(flush=flush), StreamOperations(flush=flush)
        self._code = self._waiting.write(self._word.address, 0)
        self._done.write(self._word.address, 0)

    def box(self, lane: int, phase: Phase) -> torch.Tensor:
        return self._boxes[lane][phase]

    def put(self, exchange: Exchange) -> None:
        up = self.streams.queue_on("up", after=self.streams.record())
        # Not after the compute so far. A peer sends only after this rank's last signal, which came after this rank's
        # last use of the box. So the peers' slabs can arrive while this rank still computes.
        down = self.streams.queue_on("down")
        self._announce(exchange, down)
        if self.streams.capturing:  # there is no capture, and so no replay of a medium's own, inside a capture
            signaled: list[Event] = []
            self._upload(exchange, up, signaled)
            self._download(exchange, down, signaled)
        elif (prepared := self._prepare(exchange, up, down)) is not None:
            prepared.upload.queue(up)
            prepared.download.queue(down)
        else:
            self._upload(exchange, up)
            self._download(exchange, down)
        self._arrived[exchange.lane][exchange.phase] = self.streams.record_on("down")

    def _prepare(self, exchange: Exchange, up: int, down: int) -> _Prepared | None:
        """Return one replay per stream for an exchange from its third use on, so dozens of driver calls become two.

        `None` for slabs of a single chunk: they save few calls, and in decode a layout is rarely reused.
        """
        if isinstance(exchange.prepared, _Prepared):
            return exchange.prepared
        exchange.prepared = (exchange.prepared or 0) + 1
        if exchange.prepared <= _USES_BEFORE_REPLAY or not _goes_in_chunks(exchange):
            return None

        def upload_and_signal() -> None:
            self._upload(exchange, up)
            self._signal_last(exchange, up)

        prepared = exchange.prepared = _Prepared(
            self.memory.capture(up, upload_and_signal),
            self.memory.capture(down, lambda: self._download(exchange, down)),
        )
        return prepared

    def signal(self, exchange: Exchange) -> None:
        """Set the flags of the last chunks. Earlier ones directly follow their copies.

        A replay and a captured step contain all flags.
        """
        if not self.streams.capturing and not isinstance(exchange.prepared, _Prepared):
            self._signal_last(exchange, self.streams.queue_on("up"))

    def wait(self, exchange: Exchange) -> None:
        arrived = self._arrived[exchange.lane][exchange.phase]
        assert arrived is not None
        self.streams.wait(arrived)

    def describe(self, names: MemoryNames) -> None:
        for lane, boxes in enumerate(self._boxes):
            for phase in Phase:
                names.name_box(boxes[phase].data_ptr(), boxes[phase].numel(), self._group.rank, lane, phase)
                for rank in range(self._group.size):
                    for peer in range(self._group.size):
                        self._name_way(names, lane, phase, rank, peer)

    def _name_way(self, names: MemoryNames, lane: int, phase: Phase, source: int, reader: int) -> None:
        peers = f"rank {reader}" if phase is Phase.COMBINE else "all"
        name = f"outgoing {phase.name.lower()} slab of rank {source} for {peers}, lane {lane}"
        names.name_memory(self._slab_at(source, lane, phase, reader), self._slab_bytes[phase], name)
        for chunk in range(_MAX_CHUNKS):
            names.name_flag(self._flag(reader, lane, phase, source, chunk), reader, lane, phase, source, chunk)

    def before_replay(self) -> None:
        self._group.device_watch().next_epoch(self.streams.compute_handle)

    def _upload(self, exchange: Exchange, stream: int, signaled: list[Event] | None = None) -> None:
        """Copy chunk by chunk to this rank's memory, each followed by its flags; `signal` sets the last flags.

        signaled: in a captured step, gets an event behind the flags of each chunk, here including the last.
        """
        if not exchange.puts:
            return
        plans = {put.peer: chunks_of(put.source.numel()) for put in exchange.puts}
        for number in range(max(map(len, plans.values()))):
            flags = []
            uploaded = False
            for put in exchange.puts:
                chunks = plans[put.peer]
                if number >= len(chunks):
                    continue
                chunk = chunks[number]
                if chunk.num_bytes and not (exchange.same_source and uploaded):
                    target = self._slab_at(self._group.rank, exchange.lane, exchange.phase, put.peer) + chunk.start
                    source = put.source.data_ptr() + chunk.start
                    self.memory.copy(target, source, chunk.num_bytes, stream)
                    uploaded = True
                if number < len(chunks) - 1 or signaled is not None:
                    flags.append((put.peer, number))
            if flags:
                self._signal(exchange, tuple(flags), stream)
            if signaled is not None:
                signaled.append(self.streams.record_on("up"))

    def _download(self, exchange: Exchange, stream: int, signaled: Sequence[Event] = ()) -> None:
        """Copy chunk by chunk from the peers' memory to this rank's box, each after waiting for its flag.

        signaled: in a captured step, the events behind the flags of this rank's own chunks.
        """
        box = self._boxes[exchange.lane][exchange.phase].data_ptr()
        plans = {arrival.peer: chunks_of(arrival.num_bytes) for arrival in exchange.arrivals}
        for number in range(max(map(len, plans.values()), default=0)):
            if number < len(signaled):
                self.streams.queue_on("down", after=signaled[number])
            for arrival in exchange.arrivals:
                if number >= len(plans[arrival.peer]):
                    continue
                chunk = plans[arrival.peer][number]
                self.memory.run(self._wait_for(exchange, arrival.peer, number), stream)
                if chunk.num_bytes:
                    target = box + arrival.offset + chunk.start
                    source = self._slab_at(arrival.peer, exchange.lane, exchange.phase, self._group.rank) + chunk.start
                    self.memory.copy(target, source, chunk.num_bytes, stream)
        self.memory.run(self._done, stream)

    def _slab_at(self, owner: int, lane: int, phase: Phase, reader: int) -> int:
        """The address of the slab that `owner` holds for `reader`."""
        start = self._bases[owner] + self._slabs_start(lane, phase)
        return start if phase is Phase.DISPATCH else start + reader * self._slab_bytes[phase]

    def _slabs_start(self, lane: int, phase: Phase) -> int:
        """The offset, in every rank's memory, of its slab for rank 0, or for all."""
        return self._lane_starts[lane] + (0 if phase is Phase.DISPATCH else self._slab_bytes[0])

    def _flag(self, reader: int, lane: int, phase: Phase, source: int, chunk: int) -> int:
        way = (lane * len(Phase) + phase) * self._group.size + source
        return self._bases[reader] + 4 * (way * _MAX_CHUNKS + chunk)

    def _signal_last(self, exchange: Exchange, stream: int) -> None:
        last = tuple((put.peer, len(chunks_of(put.source.numel())) - 1) for put in exchange.puts)
        self._signal(exchange, last, stream)

    def _signal(self, exchange: Exchange, flags: tuple[tuple[int, int], ...], stream: int) -> None:
        """Set the flags of each (peer, chunk) in one batch, which is built on first use."""
        key = (exchange.lane, exchange.phase, *(number for flag in flags for number in flag))
        operations = self._signals.get(key)
        if operations is None:
            operations = self._signals[key] = StreamOperations(flush=self._flush)
            for peer, chunk in flags:
                flag = self._flag(peer, exchange.lane, exchange.phase, self._group.rank, chunk)
                operations.write(flag, _SET)
        self.memory.run(operations, stream)

    def _wait_for(self, exchange: Exchange, peer: int, chunk: int) -> StreamOperations:
        """The operations that wait for the flag of a chunk and clear it, built on first use."""
        key = (exchange.lane, exchange.phase, peer, chunk)
        operations = self._waits.get(key)
        if operations is None:
            flag = self._flag(self._group.rank, exchange.lane, exchange.phase, peer, chunk)
            operations = self._waits[key] = StreamOperations(flush=self._flush)
            operations.wait(flag, _SET)
            operations.write(flag, _CLEAR)
        return operations

    def _announce(self, exchange: Exchange, stream: int) -> None:
        """Tell the device watch what the down stream is about to wait for."""
        peer = exchange.arrivals[0].peer if len(exchange.arrivals) == 1 else ALL_PEERS
        code = self._word.code(located(exchange.label), captured=self.streams.capturing)
        self._waiting.set_value(self._code, code + peer)
        self.memory.run(self._waiting, stream)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The replays of an exchange that has been used before."""

    upload: Replay
    download: Replay


def _goes_in_chunks(exchange: Exchange) -> bool:
    sizes = [*(put.source.numel() for put in exchange.puts), *(arrival.num_bytes for arrival in exchange.arrivals)]
    return any(len(chunks_of(size)) > 1 for size in sizes)


class HostKernelMailbox(KernelMailbox, HostStagedMailbox):
    """The mailbox in host memory with kernels for small exchanges."""

    num_epochs = MAX_SLICES
    largest_slab = LARGEST_SLAB

    def __init__(
        self, group: RankGroup, streams: CudaStreams, *, num_lanes: int, dispatch_bytes: int, combine_bytes: int
    ) -> None:
        super().__init__(
            group, streams, num_lanes=num_lanes, dispatch_bytes=dispatch_bytes, combine_bytes=combine_bytes
        )
        self._by_kernel = {}
        self._compute_word = group.device_watch().word("compute")
        self.kernels: HostKernels = LaunchedHostKernels(
            self._bases, streams.device, rank=group.rank, num_lanes=num_lanes, word=self._compute_word.address
        )

    def put_by_kernel(self, exchange: Exchange) -> None:
        lane, phase = exchange.lane, exchange.phase
        self.kernels.exchange(
            exchange,
            self.box(lane, phase),
            target=self._slabs_start(lane, phase),
            target_step=0 if phase is Phase.DISPATCH else self._slab_bytes[phase],
            flag=self._epochs_of(lane, phase),
            code=self._compute_word.code(located(exchange.label), captured=True),
        )

    def wait_by_kernel(self, exchange: Exchange) -> None:
        """The kernel of the put has waited."""

    def describe(self, names: MemoryNames) -> None:
        super().describe(names)
        for lane in range(len(self._boxes)):
            for phase in Phase:
                for reader, base in enumerate(self._bases):
                    for number in range(self._group.size * self.num_epochs):
                        source, epoch = divmod(number, self.num_epochs)
                        flag = base + self._epochs_of(lane, phase) + 4 * number
                        names.name_flag(flag, reader, lane, phase, source, _MAX_CHUNKS + epoch)

    def _epochs_of(self, lane: int, phase: Phase) -> int:
        """The offset, in every reader's memory, of int32 [W, num_epochs], by sender."""
        return self._epochs_start + 4 * (lane * len(Phase) + phase) * self._group.size * self.num_epochs


class HostStagedTransport(SlabTransport):
    """The slab protocol through pinned host memory, by copy engines and, for small exchanges, by kernels.

    put_bytes: the largest exchange that goes by kernel, the slabs of all ranks together, 0 for none.
    """

    name = "host-staged"
    capture_obstacle = ""
    through_host = True
    medium = HostKernelMailbox

    def __init__(self, shape: ExpertShape, *, put_bytes: int = PUT_BYTES, **made_for: Unpack[MadeFor]) -> None:
        super().__init__(shape, **made_for)
        assert isinstance(self.mailbox, HostKernelMailbox)
        self.mailbox.use_kernels(put_bytes)

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        missing = [*needs.missing_flags(facts, world)]
        if facts is not None:
            need, pinned = "pinning of shared host memory", facts.gpus.pinned_memory
            missing += needs.missing_shared_memory(facts, slab_bytes(shape, world))
            missing += needs.missing(pinned, need, _raise_limit(facts))
        return needs.gpus(world) or needs.peers(facts, world) or needs.refusal_for(missing)

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        needed = slab_bytes(shape, world)
        sms = "no SMs" if facts.versions.triton is None else "SMs only for small exchanges"
        description = f"{format_bytes(needed)} of pinned host memory, {sms}"
        tried, limit = facts.gpus.pinned_bytes, facts.host.locked_memory_bytes
        if limit is None or not tried <= limit < needed:
            return Way(description)
        doubt = f"tested with {format_bytes(tried)}, but the limit on locked memory may be too low for all of it"
        return Way(f"{description}; {doubt}", _raise_limit(facts))


def _raise_limit(facts: Facts) -> str:
    limit = f"raise the limit on locked memory ({format_bytes(facts.host.locked_memory_bytes)}): `ulimit -l unlimited`"
    return limit + for_docker(facts, "--ulimit memlock=-1")
