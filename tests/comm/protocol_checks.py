"""All ranks of a slab transport in one process, one after another, for the logs that they make.

    with protocol_world("copy-engine", size=2, num_lanes=2) as world:
        world.run(layers)
        graphs = world.capture(layers)  # only on streams
        world.replay(graphs)
        problems = check(world.logs())

The transports and their media are the shipped code. They run over a driver that moves nothing, streams that are
numbers, and a group whose waits end at once. So no rank waits for another, and each rank can run completely before the
next one. The calls of the driver are kept, to be compared with the log.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch

from antiphon.comm import ExpertShape, RankGroup, Routes, Transport
from antiphon.comm.device_watch import WatchWord
from antiphon.comm.slab.mailbox import Exchange
from antiphon.comm.slab.transport import SlabTransport
from antiphon.device.cpu import CpuDevice
from antiphon.runtime import CpuStreams, CudaStreams, Streams, current_lane, finish, run_lanes
from tests.comm.world import MAX_TOKENS, World, make_shape
from tests.support.captured import Graph
from tests.support.protocol_log import LoggedEvent, LoggedMailbox, record

__all__ = [
    "FIRST_HANDLE",
    "MEDIA",
    "NUM_EPOCHS",
    "FakeStreams",
    "Layers",
    "ProtocolWorld",
    "logs_of_layers",
    "protocol_world",
    "run_layers",
]

MEDIA = ("shared-memory", "copy-engine", "host-staged")

Layers = Sequence[Sequence[Sequence[int]]]
"""Tokens of every rank, for each layer of each lane."""

_FRESH_MODULES = (
    "antiphon.device.cuda_stream_memory",
    "antiphon.comm.slab.copy_engine",
    "antiphon.comm.slab.host_staged",
    "antiphon.comm.slab.one_sided",
)
FIRST_HANDLE = 100
"""The handle of the compute stream. Other streams get the following ones, in order of first use."""

NUM_EPOCHS = 4
"""The most slices of a slab that goes by kernel through host memory."""

_WATCH_WORD = 1 << 60  # an address that is not in use


@dataclass(slots=True)
class FakeDriver:
    """Stands in for `cuda.bindings.driver`: everything succeeds, nothing happens, and calls are kept."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    captured: list[tuple[Any, ...]] | None = None  # instead of `calls`, while a stream is captured
    num_captures: int = 0
    num_replays: int = 0

    def _keep(self, call: tuple[Any, ...]) -> None:
        (self.calls if self.captured is None else self.captured).append(call)

    def module(self) -> SimpleNamespace:
        ok = SimpleNamespace(name="CUDA_SUCCESS")
        kinds = SimpleNamespace(CU_STREAM_MEM_OP_WRITE_VALUE_32="write", CU_STREAM_MEM_OP_WAIT_VALUE_32="wait")

        def batch(stream: int, count: int, operations: list[Any], flags: int) -> tuple[Any]:
            for operation in operations[:count]:
                value = operation.writeValue if operation.operation == "write" else operation.waitValue
                self._keep((operation.operation, value.address, value.value, stream))
            return (ok,)

        def copy(target: int, source: int, num_bytes: int, stream: int) -> tuple[Any]:
            self._keep(("copy", target, source, num_bytes, stream))
            return (ok,)

        def begin_capture(stream: int, mode: object) -> tuple[Any]:
            self.captured = []
            self.num_captures += 1
            return (ok,)

        def end_capture(stream: int) -> tuple[Any, Any]:
            graph, self.captured = self.captured, None
            return (ok, graph)

        def launch(graph: list[tuple[Any, ...]], stream: int) -> tuple[Any]:
            assert all(call[-1] == stream for call in graph), "captured on another stream"
            self.calls.extend(graph)
            self.num_replays += 1
            return (ok,)

        return SimpleNamespace(
            CUresult=SimpleNamespace(CUDA_SUCCESS=ok),
            CUstreamBatchMemOpType=kinds,
            CUstreamWaitValue_flags=SimpleNamespace(CU_STREAM_WAIT_VALUE_EQ=1, CU_STREAM_WAIT_VALUE_FLUSH=2),
            CUstreamBatchMemOpParams=lambda: SimpleNamespace(writeValue=SimpleNamespace(), waitValue=SimpleNamespace()),
            CUdevice_attribute=SimpleNamespace(
                CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS=1, CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES=2
            ),
            CUdeviceptr=int,
            cuDeviceGet=lambda index: (ok, 0),
            cuDeviceGetAttribute=lambda attribute, ordinal: (ok, 1),
            cuMemHostRegister=lambda address, num_bytes, flags: (ok,),
            cuMemHostUnregister=lambda address: (ok,),
            cuMemHostGetDevicePointer=lambda address, flags: (ok, address),
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1),
            cuStreamBeginCapture=begin_capture,
            cuStreamEndCapture=end_capture,
            cuGraphInstantiate=lambda graph, flags: (ok, graph),
            cuGraphDestroy=lambda graph: (ok,),
            cuGraphExecDestroy=lambda graph: (ok,),
            cuGraphLaunch=launch,
            cuMemcpyAsync=copy,
            cuStreamBatchMemOp=batch,
        )


class FakeStreams(CudaStreams):
    """Streams without a device: handles are numbers, events are new objects, and tensors are on the CPU."""

    owner = CpuDevice("cpu")

    def __init__(self) -> None:
        self._handles: dict[str, int] = {"compute": FIRST_HANDLE}
        self._capturing = False

    @contextmanager
    def captures(self) -> Iterator[None]:
        """A context in which work counts as being captured."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def join(self) -> None:
        pass

    def on_compute_stream(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def compute_handle(self) -> int:
        return self._handles["compute"]

    def record(self) -> Any:
        return object()

    def record_on(self, name: str) -> Any:
        return object()

    def wait(self, event: Any) -> None:
        pass

    def queue_on(self, name: str, *, after: Any = None) -> int:
        return self._handles.setdefault(name, FIRST_HANDLE + len(self._handles))


class FakePuts:
    """Stands in for kernels: nothing happens."""

    def __init__(self, bases: list[int], flags: torch.Tensor, *, rank: int, num_lanes: int, word: int) -> None:
        assert flags.numel() >= num_lanes * 2 * len(bases)

    def put(self, exchange: Exchange, target: int, flag: int) -> None:
        pass

    def wait(self, exchange: Exchange, code: int) -> None:
        pass


class FakeHostKernels:
    """Stands in for kernels: nothing happens."""

    def __init__(self, bases: list[int], device: torch.device, *, rank: int, num_lanes: int, word: int) -> None:
        pass

    def exchange(
        self, exchange: Exchange, box: torch.Tensor, *, target: int, target_step: int, flag: int, code: int
    ) -> None:
        pass


class FakeGroup(RankGroup):
    """One of several ranks in this process, whose waits end at once."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank=rank, size=size, process_group=object())  # type: ignore[arg-type]
        self.epochs: list[int] = []  # the streams on which an epoch was queued
        self.watch = SimpleNamespace(word=lambda stream: WatchWord(_WATCH_WORD), next_epoch=self.epochs.append)

    def all_gather_object(self, value: object) -> list[Any]:
        return [value] * self.size

    def wait_until(self, done: Callable[[], bool], label: str, *, peer: int | None) -> None:
        pass

    def device_watch(self) -> Any:
        return self.watch


class ProtocolWorld:
    """The transports of all ranks, in rank order, each with its log if it is recorded."""

    def __init__(self, transports: list[SlabTransport], driver: FakeDriver, *, recorded: bool) -> None:
        self.transports = transports
        self.driver = driver
        self.recorders = [record(transport) for transport in transports] if recorded else []

    def run(self, layers: Layers) -> None:
        for transport in self.transports:
            run_layers(transport, layers, streams=_streams_of(transport))

    def capture(self, layers: Layers) -> list[Graph]:
        """Capture the same work on every rank, which does not run."""
        graphs = []
        for transport, log in zip(self.transports, self.recorders, strict=True):
            begin, rounds = len(log.events), dict(log.rounds)
            with cast("FakeStreams", transport.streams).captures():
                run_layers(transport, layers, streams=_streams_of(transport))
            graphs.append(Graph(log.events[begin:], rounds))
            del log.events[begin:]
            log.rounds = rounds
        return graphs

    def replay(self, graphs: Sequence[Graph]) -> None:
        """Replay every rank's graph, in the order in which its streams queued it."""
        for transport, log, graph in zip(self.transports, self.recorders, graphs, strict=True):
            transport.before_replay()
            log.events += graph.replay(log.rounds)

    def is_watch_word(self, address: int) -> bool:
        return address == _WATCH_WORD

    def logs(self) -> list[list[LoggedEvent]]:
        return [log.events for log in self.recorders]


@contextmanager
def protocol_world(
    name: str,
    *,
    size: int,
    num_lanes: int,
    shape: ExpertShape | None = None,
    smallest_chunk: int = 256,
    recorded: bool = True,
    put_bytes: int | None = None,
) -> Iterator[ProtocolWorld]:
    """Transports whose runs are logged. They may be changed before they run.

    put_bytes: the largest exchange that goes by kernel; by default none in `host-staged`, and many in `one-sided`.
    smallest_chunk: in bytes; small, so that even small slabs go through host memory in several chunks.
    """
    driver = FakeDriver()
    shape = shape or make_shape(torch.float32, num_experts=24, top_k=2, hidden_size=16)
    with ExitStack() as stack:
        stack.enter_context(_fresh_media(driver))
        stack.enter_context(patch("torch.cuda.synchronize"))
        chunks = {"_SMALLEST_CHUNK": smallest_chunk, "_CHUNK_ALIGNMENT": 64}
        stack.enter_context(patch.multiple("antiphon.comm.slab.host_staged", **chunks))
        stack.enter_context(patch("antiphon.comm.slab.host_staged.HostKernelMailbox.num_epochs", NUM_EPOCHS))
        memories: list[torch.Tensor] = []
        transports = []
        for rank in range(size):
            with _shared_memories(rank, size, memories):
                transports.append(_make(name, shape, FakeGroup(rank, size), num_lanes, put_bytes))
        yield ProtocolWorld(transports, driver, recorded=recorded)


def _make(name: str, shape: ExpertShape, group: RankGroup, num_lanes: int, put_bytes: int | None) -> SlabTransport:
    module_name, class_name = {
        "shared-memory": ("shared_memory", "SharedMemoryTransport"),
        "copy-engine": ("copy_engine", "CopyEngineTransport"),
        "host-staged": ("host_staged", "HostStagedTransport"),
        "one-sided": ("one_sided", "OneSidedTransport"),
    }[name]
    kind = getattr(import_module(f"antiphon.comm.slab.{module_name}"), class_name)
    streams: Streams = CpuStreams() if name == "shared-memory" else FakeStreams()
    limit = {} if name in ("shared-memory", "copy-engine") else {"put_bytes": put_bytes}
    if put_bytes is None:
        limit = {"put_bytes": 0} if name == "host-staged" else {}
    transport: SlabTransport = kind(
        shape, group=group, streams=streams, num_lanes=num_lanes, max_tokens=MAX_TOKENS, **limit
    )
    return transport


@contextmanager
def _fresh_media(driver: FakeDriver) -> Iterator[None]:
    """Import the CUDA media again over the fake driver, and restore everything afterwards."""
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver.module()  # type: ignore[attr-defined]
    stand_ins = {"cuda": ModuleType("cuda"), "cuda.bindings": bindings, "cuda.bindings.driver": bindings.driver}
    packages = {name: vars(import_module(name.rpartition(".")[0])) for name in _FRESH_MODULES}
    replaced = {name: sys.modules.pop(name, None) for name in (*_FRESH_MODULES, *stand_ins)}
    attributes = {name: package.pop(name.rpartition(".")[2], None) for name, package in packages.items()}
    sys.modules |= stand_ins
    try:
        for name in _FRESH_MODULES:
            import_module(name)
        yield
    finally:
        restore = [(sys.modules, name, before) for name, before in replaced.items()]
        restore += [(packages[name], name.rpartition(".")[2], before) for name, before in attributes.items()]
        for kept, name, before in restore:
            kept.pop(name, None)
            if before is not None:
                kept[name] = before


@contextmanager
def _shared_memories(rank: int, size: int, memories: list[torch.Tensor]) -> Iterator[None]:
    """Patch in memory that ranks share, which the first rank allocates for all."""

    def memories_of(num_bytes: int) -> list[torch.Tensor]:
        if not memories:
            memories.extend(torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(size))
        return memories

    def share(group: RankGroup, num_bytes: int, *, what: str) -> list[torch.Tensor]:
        return memories_of(num_bytes)

    symmetric = SimpleNamespace(
        empty=lambda num_bytes, dtype, device: memories_of(num_bytes)[rank],
        rendezvous=lambda memory, group: SimpleNamespace(buffer_ptrs=[other.data_ptr() for other in memories]),
    )
    with (
        patch("antiphon.comm.slab.copy_engine.symmetric_memory", symmetric),
        patch("antiphon.comm.slab.one_sided.PutKernels", FakePuts),
        patch("antiphon.comm.slab.host_staged.LaunchedHostKernels", FakeHostKernels),
        patch("antiphon.comm.slab.host_staged.share_host_memory", share),
        patch("antiphon.comm.slab.host_staged.unregister_host_memory", lambda memories: None),
        patch("antiphon.comm.slab.shared_memory.share_host_memory", share),
    ):
        yield


def _streams_of(transport: SlabTransport) -> Streams | None:
    """The streams that a run should join: if they are logged, those that log it."""
    mailbox = transport.mailbox
    if isinstance(mailbox, LoggedMailbox):
        mailbox = mailbox.inner
    return getattr(mailbox, "streams", None)


def run_layers(transport: Transport, layers: Layers, *, streams: Streams | None = None) -> None:
    """Dispatch and combine on every lane, layer by layer. Experts write nothing, as only the log matters."""
    shape, rank = transport.shape, transport.group.rank
    device = transport.streams.device

    def run_lane() -> None:
        for number, counts in enumerate(layers[current_lane()]):
            x_TD = torch.zeros(counts[rank], shape.hidden_size, dtype=shape.dtype, device=device)
            ids_TK = torch.arange(shape.top_k, device=device).repeat(counts[rank], 1)
            routes = Routes(ids_TK, torch.ones(ids_TK.shape, dtype=shape.weight_dtype, device=device))
            label = f"layer {number}"
            rows = finish(transport.dispatch(x_TD, routes, tokens_by_rank=tuple(counts), label=label))
            assert rows.out_RD is not None
            finish(transport.combine(rows.out_RD, label=label))

    run_lanes([run_lane] * len(layers), streams=streams)


def logs_of_layers(group: RankGroup, name: str, layers: Layers) -> list[LoggedEvent]:
    """The log of a real run, in the process of one rank."""
    world = World(group)
    transport = world.make(name, make_shape(torch.float32, top_k=2, hidden_size=16), num_lanes=len(layers))
    assert isinstance(transport, SlabTransport)
    log = record(transport)
    world.barrier()
    run_layers(transport, layers)
    return log.events
