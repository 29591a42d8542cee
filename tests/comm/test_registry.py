"""Names of transports, links, and the choice of a transport."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from antiphon.comm import (
    DataPath,
    ExpertShape,
    Link,
    RankGroup,
    Transport,
    TransportSpec,
    choose_transport,
    create_transport,
    load_transport,
    parse_transport,
    registry,
    usable_transports,
)
from antiphon.comm.collective.alltoall import AllToAllTransport
from antiphon.comm.local import LocalTransport
from antiphon.comm.simulated import SimulatedTransport
from antiphon.core.errors import OptionError
from antiphon.core.warn_once import warn_once
from antiphon.device.cuda import CudaDevice
from antiphon.device.device import Identity
from antiphon.machine.probe import examine_machine
from antiphon.runtime import CpuStreams, find_device
from tests.comm.protocol_checks import FakeDriver
from tests.support.errors import raises


def make_shape(num_experts: int = 8, top_k: int = 2) -> ExpertShape:
    return ExpertShape(num_experts=num_experts, top_k=top_k, hidden_size=4, dtype=torch.float32)


def make_alone(name: str | TransportSpec) -> Transport:
    return create_transport(name, make_shape(), group=RankGroup(rank=0, size=1), streams=CpuStreams(), num_lanes=2)


@pytest.mark.parametrize(
    ("text", "name", "link"),
    [
        ("auto", "auto", None),
        ("local", "local", None),
        ("allgather", "allgather", None),
        ("alltoall", "alltoall", None),
        ("my_package.transports:Fancy", "my_package.transports:Fancy", None),
        ("simulated", "auto", Link()),
        ("simulated:", "auto", Link()),
        ("simulated:alltoall", "alltoall", Link()),
        ("simulated:allgather:200MB/s", "allgather", Link(bytes_per_s=200e6)),
        ("simulated:allgather:200MB/s:1ms", "allgather", Link(bytes_per_s=200e6, latency_s=1e-3)),
        ("simulated::10GB/s:10us", "auto", Link(bytes_per_s=10e9, latency_s=10e-6)),
        ("simulated:local:1.5KB/s:2s", "local", Link(bytes_per_s=1500, latency_s=2)),
        ("simulated:local:1e3MB/s:0us", "local", Link(bytes_per_s=1e9, latency_s=0)),
    ],
)
def test_what_can_be_written(text: str, name: str, link: Link | None) -> None:
    spec = parse_transport(text)
    assert spec.name == name
    assert (spec.link is None) == (link is None)
    if link is not None and spec.link is not None:
        assert spec.link.bytes_per_s == pytest.approx(link.bytes_per_s)
        assert spec.link.latency_s == pytest.approx(link.latency_s)


@pytest.mark.parametrize(
    ("text", "option", "remedy"),
    [
        ("", "transport", "alltoall"),
        ("altoall", "transport", "did you mean 'alltoall'"),
        ("Allgather", "transport", "did you mean 'allgather'"),
        ("copy_engine", "transport", "did you mean 'copy-engine'"),
        ("alltoall:200MB/s", "transport", "'alltoall'"),
        ("local:", "transport", "'local'"),
        ("simulated:altoall", "transport inside simulated", "did you mean 'alltoall'"),
        ("simulated:simulated", "transport inside simulated", "auto"),
        ("simulated:alltoall:200MB/s:1ms:9", "transport", "INNER:BANDWIDTH:LATENCY"),
        ("simulated:alltoall:200", "bandwidth", "200MB/s"),
        ("simulated:alltoall:200mb/s", "bandwidth", "200MB/s"),
        ("simulated:alltoall:0MB/s", "bandwidth", "200MB/s"),
        ("simulated:alltoall:-1MB/s", "bandwidth", "200MB/s"),
        ("simulated:alltoall:infMB/s", "bandwidth", "200MB/s"),
        ("simulated:alltoall:MB/s", "bandwidth", "200MB/s"),
        ("simulated:alltoall:1ms", "bandwidth", "200MB/s"),
        ("simulated:alltoall:1MB/s:5", "latency", "1ms"),
        ("simulated:alltoall:1MB/s:5m", "latency", "1ms"),
        ("simulated:alltoall:1MB/s:", "latency", "1ms"),
        ("my_package.transports", "transport", "class"),
        ("my_package.transports:Fancy:1ms", "transport", "class"),
        ("my_package.transports:not a name", "transport", "class"),
    ],
)
def test_what_is_refused(text: str, option: str, remedy: str) -> None:
    """The value is the part of the text that the option stands for."""
    part = {"transport": 0, "transport inside simulated": 1, "bandwidth": 2, "latency": 3}[option]
    with raises(OptionError, option=option, value=text.split(":")[part] if part else text, remedy=remedy):
        parse_transport(text)


@pytest.mark.parametrize(("text", "units"), [("1:1ms", "KB/s, MB/s, GB/s"), ("1MB/s:5", "us, ms, s")])
def test_units_of_a_link_are_named(text: str, units: str) -> None:
    with raises(OptionError) as raised:
        parse_transport(f"simulated:local:{text}")
    assert units in raised.error.limit


@pytest.mark.parametrize(
    ("name", "num_ranks", "top_k", "chosen", "why"),
    [
        ("auto", 1, 2, "local", "one rank holds all experts"),
        ("local", 1, 2, "local", "one rank"),
        ("allgather", 1, 2, "local", "one rank"),
        ("alltoall", 1, 2, "local", "one rank"),
        ("auto", 2, 1, "alltoall", "reaches 1.0 of 2 ranks: exact routing saves 50%"),
        ("auto", 2, 2, "alltoall", "reaches 1.5 of 2 ranks: exact routing saves 25%"),
        ("auto", 2, 3, "allgather", "would save 12%"),
        ("auto", 4, 8, "allgather", "reaches 3.6 of 4 ranks: exact routing would save 10%"),
        ("auto", 4, 4, "alltoall", "saves 32%"),
        ("auto", 8, 8, "alltoall", "reaches 5.3 of 8 ranks"),
        ("allgather", 4, 1, "allgather", "as asked"),
        ("alltoall", 4, 8, "alltoall", "as asked"),
        ("a.b:C", 1, 2, "a.b:C", "as asked"),
        ("a.b:C", 4, 2, "a.b:C", "as asked"),
    ],
)
@pytest.mark.parametrize("link", [None, Link(latency_s=1)])
def test_which_is_taken(name: str, num_ranks: int, top_k: int, chosen: str, why: str, link: Link | None) -> None:
    shape = make_shape(num_experts=16, top_k=top_k)
    spec, reason = choose_transport(TransportSpec(name=name, link=link), shape, num_ranks)
    assert (spec.name, spec.link) == (chosen, link)
    assert why in reason


def test_local_is_refused_on_several_ranks() -> None:
    with raises(OptionError, "2", option="transport", value="local", remedy="auto"):
        choose_transport(TransportSpec(name="local"), make_shape(), 2)


@pytest.mark.parametrize(
    ("link", "num_bytes", "num_messages", "expected_s", "text"),
    [
        (Link(bytes_per_s=1e6, latency_s=1e-3), 500_000, 2, 0.502, "1 MB/s, 1000 us"),
        (Link(bytes_per_s=2.5e9, latency_s=0), 0, 1, 0.0, "2500 MB/s, 0 us"),
        (Link(), 1_000_000, 0, 1e-3, "1000 MB/s, 100 us"),
    ],
)
def test_link_model(link: Link, num_bytes: int, num_messages: int, expected_s: float, text: str) -> None:
    assert link.duration_s(num_bytes, num_messages) == pytest.approx(expected_s)
    assert str(link) == text


def test_a_simulated_transport_is_named_as_such() -> None:
    spec = parse_transport("simulated:alltoall:200MB/s:1ms")
    assert str(spec) == "simulated alltoall (200 MB/s, 1000 us)"
    transport = make_alone(spec)
    assert isinstance(transport, SimulatedTransport)
    assert isinstance(transport.inner, LocalTransport)
    assert transport.link == spec.link
    assert transport.num_lanes == 2


def test_auto_on_one_rank_is_local() -> None:
    assert isinstance(make_alone("auto"), LocalTransport)


@pytest.mark.parametrize(
    ("path", "names", "remedy"),
    [
        ("no_such_package.transports:Fancy", ("no_such_package",), "PYTHONPATH"),
        ("antiphon.comm.local:NoSuchClass", ("NoSuchClass",), "PYTHONPATH"),
        ("antiphon.comm.local:Transport2", ("Transport2",), "PYTHONPATH"),
        ("antiphon.comm.simulated:Link", ("antiphon.comm.Transport",), "class"),
        ("os.path:join", ("antiphon.comm.Transport",), "class"),
        (".relative:Fancy", (), "PYTHONPATH"),
        ("antiphon..comm:Fancy", (), "PYTHONPATH"),
    ],
)
def test_classes_that_cannot_be_loaded(path: str, names: tuple[str, ...], remedy: str) -> None:
    with raises(OptionError, *names, option="transport", value=path, remedy=remedy):
        load_transport(parse_transport(path))


def test_a_transport_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(AllToAllTransport):
        name = "own"

    module = ModuleType("antiphon_test.own_transports")
    module.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "antiphon_test", ModuleType("antiphon_test"))
    monkeypatch.setitem(sys.modules, "antiphon_test.own_transports", module)
    assert isinstance(make_alone("antiphon_test.own_transports:Own"), Own)


@pytest.mark.parametrize("num_ranks", [0, 3, 5, 16])
def test_experts_must_divide_by_ranks(num_ranks: int) -> None:
    with raises(OptionError, "num_experts=8", option="ranks", value=num_ranks, remedy="1, 2, 4, 8"):
        make_shape().experts_per_rank(num_ranks)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_at_least_float32(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    shape = ExpertShape(num_experts=2, top_k=1, hidden_size=1, dtype=dtype)
    assert shape.weight_dtype == weight_dtype


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("auto", {}, "one-sided"),
        ("auto", {"peer_access": False}, "host-staged"),
        ("host-staged", {}, "host-staged"),
        ("alltoall", {"peer_access": False}, "alltoall"),
    ],
)
def test_what_gpus_use(name: str, options: dict[str, object], expected: str) -> None:
    spec, _ = choose_transport(parse_transport(name), make_shape(), 2, device_kind="cuda", **options)
    assert spec.name == expected


def test_exact_routing_for_many_gpus() -> None:
    spec, reason = choose_transport(parse_transport("auto"), make_shape(top_k=2), 8, device_kind="cuda")
    assert spec.name == "alltoall"
    assert "saves" in reason


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("copy-engine", {}, "shared-memory"),
        ("host-staged", {}, "shared-memory"),
        ("nccl-zero-cta", {}, "shared-memory"),
        ("one-sided", {}, "shared-memory"),
        ("shared-memory", {"device_kind": "cuda"}, "host-staged"),
        ("alltoall:16ctas", {}, "alltoall"),
        ("copy-engine", {"device_kind": "cuda", "peer_access": False}, "host-staged"),
    ],
)
def test_transports_that_the_devices_cannot_serve(name: str, options: dict[str, object], remedy: str) -> None:
    with raises(OptionError, option="transport", value=name, remedy=remedy):
        choose_transport(parse_transport(name), make_shape(), 2, **options)


def test_adding_a_transport_touches_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a class that answers for itself and a line in the registry, doctor, the option and `auto` know it."""
    (tmp_path / "pigeons.py").write_text(
        "from antiphon.comm import Refusal, Way\n"
        "from antiphon.comm.collective.alltoall import AllToAllTransport\n\n\n"
        "class PigeonTransport(AllToAllTransport):\n"
        "    name = 'pigeon'\n\n"
        "    @classmethod\n"
        "    def refusal(cls, facts, shape, world):\n"
        "        return Refusal('too many ranks', 'ask for --ranks 2') if world.ranks > 2 else None\n\n"
        "    @classmethod\n"
        "    def way(cls, facts, shape, world):\n"
        "        return Way('through the air')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry._CLASSES, "pigeon", ("pigeons:PigeonTransport",))
    spec = parse_transport("pigeon")
    assert choose_transport(spec, make_shape(), 2)[0].name == "pigeon"
    with raises(OptionError, "too many ranks", option="transport", value="pigeon", remedy="--ranks 2"):
        choose_transport(spec, make_shape(), 4)
    found = {one.name: one for one in usable_transports(examine_machine(), ranks=2, device_kind="cpu")}
    assert (found["pigeon"].usable, found["pigeon"].reason) == (True, "through the air")
    assert "pigeon" in found["simulated"].reason
    assert load_transport(spec).name == "pigeon"


def test_blocks_of_nccl() -> None:
    spec = parse_transport("allgather:16ctas")
    assert (spec.name, spec.ctas, str(spec)) == ("allgather", 16, "allgather:16ctas")


@pytest.mark.parametrize(("version", "warned"), [((2, 27, 5), True), ((2, 28, 0), False), ((3, 0, 0), False)])
def test_an_nccl_without_copy_engines_is_no_silent_baseline(
    version: tuple[int, ...], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    bindings = ModuleType("cuda.bindings")
    bindings.driver = FakeDriver().module()  # type: ignore[attr-defined]
    with monkeypatch.context() as only_here:
        for name in ("device.cuda_stream_memory", "comm.collective.nccl", "comm.collective.nccl_zero_cta"):
            only_here.delitem(sys.modules, f"antiphon.{name}", raising=False)
        only_here.setitem(sys.modules, "cuda", ModuleType("cuda"))
        only_here.setitem(sys.modules, "cuda.bindings", bindings)
        only_here.setitem(sys.modules, "cuda.bindings.driver", bindings.driver)
        before = set(sys.modules)
        module = import_module("antiphon.comm.collective.nccl_zero_cta")
        for _ in range(2):
            module.warn_of_kernels(version)
        for name in set(sys.modules) - before:  # they are made of the stand-in
            del sys.modules[name]
    assert len(caplog.messages) == warned
    if warned:
        assert "NCCL 2.27.5 has no copy-engine collectives" in caplog.text and "NCCL 2.28 or later" in caplog.text


# ---- the data path


class Anything(Transport):
    name = "anything"

    def send_tokens(self, *arguments: Any) -> Any: ...

    def send_partials(self, *arguments: Any) -> Any: ...


class ThroughHost(Anything):
    through_host = True


def path_of(kind: type[Transport], *, ranks: int, peers_reach: bool, link: Link | None = None) -> DataPath:
    group: Any = SimpleNamespace(rank=0, size=ranks)
    transport = kind(make_shape(), group=group, streams=CpuStreams(), num_lanes=1)
    transport.peers_reach = peers_reach
    return transport.data_path if link is None else SimulatedTransport(transport, link).data_path


@pytest.mark.parametrize(
    ("kind", "ranks", "peers_reach", "link", "expected"),
    [
        (Anything, 1, False, None, DataPath.NONE),
        (Anything, 2, False, None, DataPath.HOST),
        (Anything, 2, True, None, DataPath.PEERS),
        (ThroughHost, 2, True, None, DataPath.HOST),
        (Anything, 2, False, Link(), DataPath.SIMULATED),
        (Anything, 2, True, Link(), DataPath.SIMULATED),
        (Anything, 1, False, Link(), DataPath.NONE),
    ],
)
def test_how_data_travels(
    kind: type[Transport], ranks: int, peers_reach: bool, link: Link | None, expected: DataPath
) -> None:
    assert path_of(kind, ranks=ranks, peers_reach=peers_reach, link=link) is expected


@pytest.mark.parametrize("name", ["allgather", "copy-engine"])
@pytest.mark.parametrize(
    ("allowed", "variable", "reaches", "others", "expected"),
    [
        (True, "0", True, True, DataPath.PEERS),
        (True, "0", True, False, DataPath.HOST),  # the other rank does not reach this one
        (True, "0", False, True, DataPath.HOST),
        (False, "0", True, True, DataPath.HOST),
        (True, "1", True, True, DataPath.HOST),
    ],
)
def test_all_devices_are_asked_whatever_the_transport(
    name: str,
    allowed: bool,
    variable: str,
    reaches: bool,
    others: bool,
    expected: DataPath,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", variable)
    monkeypatch.setattr(CudaDevice, "identity", lambda self: Identity(self.index, f"GPU-{self.index}"))
    monkeypatch.setattr(CudaDevice, "reaches", lambda self, devices: reaches)
    monkeypatch.setattr(registry, "load_transport", lambda *arguments: Anything)
    gathered = iter([[Identity(0, "GPU-0"), Identity(1, "GPU-1")], None])

    def all_gather(mine: Any) -> list[Any]:
        return next(gathered) or [mine, others]

    group: Any = SimpleNamespace(rank=0, size=2, all_gather_object=all_gather)
    streams: Any = SimpleNamespace(owner=find_device("cuda"))
    transport = create_transport(
        name, make_shape(), group=group, streams=streams, num_lanes=1, max_tokens=4, peer_access=allowed
    )
    assert transport.data_path is expected
    assert next(gathered, "asked twice") == "asked twice"
