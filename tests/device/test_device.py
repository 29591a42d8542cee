"""The device facade on the CPU, and its CUDA side where there is a device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from antiphon.device import device as devices

CPU = torch.device("cpu")

needs_cuda = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")


def test_every_rank_is_on_the_cpu_and_nothing_is_to_be_done() -> None:
    assert [devices.device_for_rank("cpu", rank) for rank in range(3)] == [CPU] * 3
    assert devices.num_devices("cpu") == 1
    devices.activate(CPU)
    devices.synchronize(CPU)
    devices.reset_peak(CPU)
    assert devices.describe(CPU).startswith("CPU (")


def test_memory_of_the_host() -> None:
    free_bytes, total_bytes = devices.memory(CPU)
    assert 0 < free_bytes < total_bytes
    assert 0 < devices.peak_bytes(CPU) < total_bytes
    assert total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_gpus_are_found_on_the_bus_whatever_torch_can_do_with_them(tmp_path: Path) -> None:
    found = {
        "0000:18:00.0": ("0x10de", "0x030200"),  # a GPU without a display
        "0000:3b:00.0": ("0x10de", "0x030000"),  # one with a display
        "0000:3b:00.1": ("0x10de", "0x040300"),  # its sound
        "0000:05:00.0": ("0x10de", "0x068000"),  # an NVSwitch
        "0000:00:02.0": ("0x8086", "0x030000"),  # somebody else's
    }
    for name, (vendor, kind) in found.items():
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    (tmp_path / "sys/bus/pci/devices/0000:06:00.0").mkdir()  # nobody may read it
    assert devices.nvidia_gpus(tmp_path) == 2
    assert devices.nvidia_gpus(tmp_path / "nothing") == 0


def test_ranks_take_cuda_devices_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antiphon.device.cuda_device.num_devices", lambda: 2)
    assert devices.num_devices("cuda") == 2
    assert [str(devices.device_for_rank("cuda", rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.gpu
@needs_cuda
def test_the_peak_of_a_device_counts_what_was_held_in_between() -> None:
    device = torch.device("cuda", 0)
    devices.activate(device)
    devices.reset_peak(device)
    before = devices.peak_bytes(device)
    torch.empty(2**28, dtype=torch.uint8, device=device)  # dropped at once
    assert 2**28 <= devices.peak_bytes(device) - before < 2**28 + 2**26
    free_bytes, total_bytes = devices.memory(device)
    assert 0 < free_bytes < total_bytes
    devices.reset_peak(device)
    assert abs(devices.peak_bytes(device) - before) < 2**26
    assert torch.get_float32_matmul_precision() == "highest"
