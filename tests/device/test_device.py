"""The contract of a device, for every kind available here, and what is specific to each kind."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from antiphon.core.errors import OptionError
from antiphon.device.cpu import CpuDevice
from antiphon.device.cuda import CudaDevice
from antiphon.device.device import Device, Identity
from antiphon.device.table import device_for_rank, device_of, find_device, num_devices, rank_device, streams_for
from tests.support.errors import raises

CPU = torch.device("cpu")
KINDS = [
    "cpu",
    "generic:cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("generic:cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Device:
    found = find_device(request.param)
    if not found.count():
        pytest.skip(f"no device of kind {request.param}")
    found.activate()
    return found


# ---- the contract


def test_a_device_says_what_and_where_it_is(device: Device) -> None:
    assert device.describe()
    assert device == find_device(device.kind, device.index) != find_device(device.kind, device.index + 1)
    assert torch.zeros(2, device=device.torch_device).device == device.torch_device
    assert device.autocast_types[-1] == "cpu"
    device.synchronize()


def test_memory_has_a_peak(device: Device) -> None:
    device.reset_peak()
    free_bytes, total_bytes = device.memory()
    assert 0 < free_bytes < total_bytes
    before = device.peak_bytes()
    torch.empty(2**28, dtype=torch.uint8, device=device.torch_device).fill_(1)  # dropped at once
    held = device.peak_bytes() - before
    assert 0 < before < total_bytes
    if device.own_memory:
        assert 2**28 <= held < 2**28 + 2**26
        device.reset_peak()
        assert abs(device.peak_bytes() - before) < 2**26
    assert torch.get_float32_matmul_precision() == "highest"


def test_two_devices_of_one_hardware_are_not_the_same() -> None:
    ours, generic = find_device("cuda", 1), find_device("generic:cuda", 1)
    assert ours != generic
    assert ours.torch_device == generic.torch_device == torch.device("cuda", 1)
    assert ours.fused_kernels and not generic.fused_kernels
    assert ours.collective_backend == generic.collective_backend == "nccl"


def test_what_a_comm_stream_does_is_there_behind_its_event(device: Device) -> None:
    streams = device.streams()
    assert (streams.owner, streams.device) == (device, device.torch_device)
    x = torch.zeros(2**20, device=device.torch_device)
    assert streams.on_compute_stream()
    for round_ in range(1, 4):
        x += 1
        with streams.comm(after=streams.record()):
            assert streams.on_compute_stream() is not device.queues
            x *= 2
            arrived = streams.record()
        assert streams.on_compute_stream()
        streams.wait(arrived)
        expected = 2 ** (round_ + 1) - 2
        assert x.eq(expected).all()
    with streams.comm(after=streams.record(), name="up"):
        x -= x
    streams.join()
    assert not x.any()
    with streams.leave_free(0):
        pass


def test_a_timer_measures_what_is_queued(device: Device) -> None:
    timer = device.timer()
    timer.start()
    x = torch.ones(512, 512, device=device.torch_device)
    for _ in range(20):
        x = x @ x / 512
    assert 0 < timer.elapsed_ms(timer.stop()) < 60_000


# ---- the table


def test_making_a_device_touches_no_hardware() -> None:
    device = find_device("cuda", 3)
    assert (device.index, device.torch_device) == (3, torch.device("cuda", 3))
    assert not torch.cuda.is_initialized() or torch.cuda.device_count()


def test_a_kind_that_is_not_in_the_table() -> None:
    with raises(OptionError, "cdua", "cuda", option="device", value="cdua"):
        find_device("cdua")


def test_a_torch_device_is_found_in_the_table() -> None:
    assert device_of(CPU) == CpuDevice("cpu")
    assert device_of(torch.device("cuda", 1)) == CudaDevice("cuda", 1)
    device = find_device("cpu")
    assert device_of(device) is device
    assert streams_for(CPU).owner == streams_for(device).owner == device


def test_ranks_share_the_cpu_and_take_other_devices_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [device_for_rank("cpu", rank) for rank in range(3)] == [CPU] * 3
    assert num_devices("cpu") == 1
    monkeypatch.setattr(CudaDevice, "count", lambda self: 2)
    assert num_devices("cuda") == 2
    assert [str(device_for_rank("cuda", rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert rank_device("cuda", 3) == find_device("cuda", 1)


# ---- what is a kind's own


def test_memory_of_the_host() -> None:
    assert find_device("cpu").memory().total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("own", "others", "reached"),
    [
        ("ab", [(0, "GPU-a"), (1, "GPU-b")], True),
        ("ac", [(0, "GPU-a"), (1, "GPU-c")], False),  # no access
        ("a", [(0, "GPU-a"), (0, "GPU-b")], False),  # CUDA_VISIBLE_DEVICES shows each process one device
        ("a", [(0, "GPU-a"), (1, "GPU-b")], False),  # or only its own
        ("ab", [(0, "GPU-a"), (1, "GPU-c")], False),  # or another one in that place
        ("ab", [(0, "GPU-a")], True),
    ],
)
def test_devices_are_known_by_more_than_their_index(
    own: str, others: list[tuple[int, str]], reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"GPU-{letter}" for letter in own]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=names[index]))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: names[other] == "GPU-b")
    assert CudaDevice("cuda", 0).reaches([Identity(*other) for other in others]) is reached
