"""The generic device: its calls to the accelerator, and the engine on the pretended device and on CUDA hardware."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from typer.testing import CliRunner

from antiphon import LLM, SamplingParams
from antiphon.cli.app import app
from antiphon.core.errors import LaneError, OptionError
from antiphon.device import table
from antiphon.device.generic import GenericDevice, GenericStreams
from antiphon.device.generic_cpu import PretendedDevice
from antiphon.device.table import find_device
from antiphon.kernels.dispatch import no_cuda_kernels, takes_cuda_kernels
from tests.support.errors import raises
from tests.support.prompts import mixed_prompts

GREEDY = SamplingParams(max_tokens=16, temperature=0.0)
SPLIT_ALL = {"dbo": "on", "dbo_prefill_token_threshold": 2, "dbo_decode_token_threshold": 2}


class ClockedStream:
    """A stream that keeps what has happened before its next work."""

    def __init__(self) -> None:
        self.happened: set[str] = set()

    def record_event(self) -> frozenset[str]:
        return frozenset(self.happened)

    def wait_event(self, event: frozenset[str]) -> None:
        self.happened |= event

    def wait_stream(self, stream: ClockedStream) -> None:
        self.happened |= stream.happened


class ClockedDevice(PretendedDevice):
    """Its streams say what would have happened on hardware, where work runs late."""

    def __init__(self) -> None:
        super().__init__("generic:cpu")
        self.stream = ClockedStream()

    def new_stream(self) -> ClockedStream:
        return ClockedStream()

    def current_stream(self) -> ClockedStream:
        return self.stream

    def set_stream(self, stream: ClockedStream) -> None:
        self.stream = stream


def test_a_comm_stream_runs_after_its_event_and_joins_at_the_end() -> None:
    device = ClockedDevice()
    compute = device.stream
    streams = GenericStreams(device)
    compute.happened.add("pack")
    ready = streams.record()
    compute.happened.add("the other lane")
    with streams.comm(after=ready):
        assert device.stream is not compute
        assert device.stream.happened == {"pack"}
        device.stream.happened.add("send")
        arrived = streams.record()
        with raises(LaneError, remedy="stream"), streams.comm(after=arrived):
            pass
    assert device.stream is compute
    assert "send" not in compute.happened
    streams.wait(arrived)
    assert compute.happened == {"pack", "the other lane", "send"}
    with streams.comm(after=ready, name="up"):
        assert device.stream.happened == {"pack"}
        device.stream.happened.add("upload")
    streams.join()
    assert "upload" in compute.happened


def test_the_accelerator_of_this_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert find_device("generic", 2).torch_device == torch.device("cuda", 2)
    assert [find_device(kind).count() for kind in ("generic", "generic:cuda", "xpu")] == [3, 3, 0]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert find_device("generic:cuda").count() == 0
    with raises(OptionError, option="device", value="generic", remedy="generic:cpu"):
        find_device("generic")


def test_what_only_cuda_has_is_not_promised() -> None:
    device = find_device("xpu", 1)
    assert isinstance(device, GenericDevice)
    assert (device.torch_device, device.collective_backend) == (torch.device("xpu", 1), "xccl")
    assert device.queues and device.own_memory and device.pinned_memory
    assert not (device.peer_access or device.stream_memory_operations or device.fused_kernels or device.sm_carveout)


def test_kernels_of_cuda_are_off_where_the_device_has_none() -> None:
    class OnCuda:
        is_cuda = True

    tensor: torch.Tensor = OnCuda()  # type: ignore[assignment]
    assert takes_cuda_kernels(tensor)
    assert not find_device("generic:cuda").fused_kernels and not find_device("generic:cpu").fused_kernels
    with no_cuda_kernels():
        assert not takes_cuda_kernels(tensor)
    assert takes_cuda_kernels(tensor)
    assert not takes_cuda_kernels(torch.zeros(1))


def test_benchmarks_refuse_a_generic_device() -> None:
    for command in ("comm", "overlap"):
        done = CliRunner().invoke(app, ["bench", command, "--device", "generic:cpu"])
        assert isinstance(done.exception, OptionError | SystemExit)
        said = f"{done.exception} {done.output}"
        assert "generic:cpu" in said and "cuda" in said


def test_a_device_is_added_by_one_file_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_cpu.py").write_text(
        "from antiphon.device.cpu import CpuDevice\n"
        "class SlowCpu(CpuDevice):\n"
        "    def describe(self):\n"
        "        return 'a slow CPU'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(table, "DEVICES", MappingProxyType({**table.DEVICES, "slow": "slow_cpu:SlowCpu"}))
    with LLM(device="slow") as llm, LLM(device="cpu") as other:
        assert llm.config.device_name == "a slow CPU"
        assert llm.generate("The sun", GREEDY)[0].text == other.generate("The sun", GREEDY)[0].text
    sys.modules.pop("slow_cpu")


def texts(device: str, ranks: int, transport: str = "auto", **options: object) -> list[list[int]]:
    """Of the bundled model; steps were split if that was asked for."""
    with LLM(device=device, ranks=ranks, transport=transport, dtype="float32", **options) as llm:
        assert (llm.config.device_kind, llm.config.dtype_name) == (device, "float32")
        outputs = llm.generate(mixed_prompts(8), GREEDY)
        if "dbo" in options:
            assert llm.stats()["steps_by_plan"]["dual"] > 4
    return [list(output.token_ids) for output in outputs]


@pytest.fixture(scope="module")
def on_the_cpu() -> list[list[int]]:
    return texts("cpu", 1)


def test_one_rank_of_the_pretended_device_says_what_the_cpu_says(on_the_cpu: list[list[int]]) -> None:
    assert texts("generic:cpu", 1, **SPLIT_ALL) == on_the_cpu


@pytest.mark.processes
@pytest.mark.parametrize("transport", ["alltoall", "allgather"])
def test_two_ranks_of_the_pretended_device_say_what_the_cpu_says(transport: str, on_the_cpu: list[list[int]]) -> None:
    assert texts("generic:cpu", 2, transport, **SPLIT_ALL) == on_the_cpu


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
def test_one_rank_on_cuda_hardware_by_generic_calls(on_the_cpu: list[list[int]]) -> None:
    assert texts("generic:cuda", 1, **SPLIT_ALL) == on_the_cpu


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("transport", ["alltoall", "allgather", "auto"])
def test_two_ranks_over_nccl_by_generic_calls(transport: str, on_the_cpu: list[list[int]]) -> None:
    assert texts("generic:cuda", 2, transport, **SPLIT_ALL) == on_the_cpu
