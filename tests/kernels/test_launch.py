"""Direct launches: with a fake of Triton's compiled kernel on the CPU, and against Triton's own launches on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from antiphon.kernels.fused import launch as launch_module
from antiphon.kernels.fused.direct import launch_obstacle
from antiphon.kernels.fused.launch import Direct, Driver, Launch, divide_up, find_driver, power_of_two

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class FakeKernel:
    """Takes launches as a JIT function does, and returns itself as what was compiled."""

    def __init__(self) -> None:
        self.through_triton: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []  # grid, stream, arguments

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def run(*args: Any, **kwargs: Any) -> FakeKernel:
            self.through_triton.append((grid, args, kwargs))
            return self

        return run

    def queue(self, grid: tuple[int, int], stream: int, arguments: tuple[Any, ...]) -> None:
        self.direct.append((grid, stream, arguments))


class FakeDriver:
    def __init__(self, *, supported: bool = True) -> None:
        self.current_device, self.has_hooks, self.supported = 0, False, supported

    def driver(self) -> Driver:
        return Driver(
            device=lambda: self.current_device,
            stream=lambda device: 1000 + device,
            hooked=lambda: self.has_hooks,
            direct=lambda compiled: Direct(queue=compiled.queue, compiled=compiled) if self.supported else None,
        )


def make_launch(fake: FakeDriver) -> tuple[FakeKernel, Launch]:
    kernel = FakeKernel()
    launch = Launch(kernel, (5, 2), integers=(7,), constants={"D": 8, "ADD": True}, num_warps=2, driver=fake.driver())
    return kernel, launch


def aligned(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """At a multiple of 16 bytes, and 16 bytes longer than asked for."""
    memory = torch.empty(size + 32, dtype=dtype)
    start = (-memory.data_ptr() % 16) // memory.element_size()
    return memory[start:]


def test_the_first_call_goes_through_triton_and_the_next_ones_do_not() -> None:
    kernel, launch = make_launch(FakeDriver())
    x, y, z = aligned(4), aligned(4), aligned(4)
    launch(x, y)
    assert kernel.through_triton == [((5, 2), (x, y, 7), {"D": 8, "ADD": True, "num_warps": 2})]
    assert kernel.direct == []
    launch(z, y)
    launch(y, x)
    assert len(kernel.through_triton) == 1
    assert kernel.direct == [
        ((5, 2), 1000, (z.data_ptr(), y.data_ptr(), 7, 8, True)),
        ((5, 2), 1000, (y.data_ptr(), x.data_ptr(), 7, 8, True)),
    ]


def test_whatever_triton_would_specialize_on_goes_through_triton_once() -> None:
    """Pointers that are no multiple of 16, each on its own; dtypes; another device."""
    fake = FakeDriver()
    kernel, launch = make_launch(fake)
    x, y, half = aligned(40), aligned(40), aligned(40, torch.bfloat16)
    arguments = [(x, y), (x[1:], y), (x, y[1:]), (x[1:], y[1:]), (half, y), (x, half), (half[1:], y)]
    for tensors in arguments:
        launch(*tensors)
    assert len(kernel.through_triton) == len(arguments)
    fake.current_device = 3
    launch(x, y)
    assert len(kernel.through_triton) == len(arguments) + 1
    assert kernel.direct == []
    launch(x[5:], y[3:])  # the same as (x[1:], y[1:]), on another device
    assert len(kernel.through_triton) == len(arguments) + 2
    fake.current_device = 0
    for tensors in arguments:
        launch(*tensors)
    launch(x[5:], y[4:])
    assert len(kernel.through_triton) == len(arguments) + 2
    assert len(kernel.direct) == len(arguments) + 1
    fake.current_device = 3
    launch(x, y)
    assert kernel.direct[-1][1] == 1003


def test_a_profiler_sees_every_launch() -> None:
    fake = FakeDriver()
    kernel, launch = make_launch(fake)
    launch(aligned(4))
    fake.has_hooks = True
    launch(aligned(4))
    assert (len(kernel.through_triton), len(kernel.direct)) == (2, 0)
    fake.has_hooks = False
    launch(aligned(4))
    assert (len(kernel.through_triton), len(kernel.direct)) == (2, 1)


def test_a_kernel_that_needs_more_always_goes_through_triton() -> None:
    kernel, launch = make_launch(FakeDriver(supported=False))
    for _ in range(3):
        launch(aligned(4))
    assert (len(kernel.through_triton), len(kernel.direct)) == (3, 0)


def test_without_a_driver_every_call_goes_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "find_driver", lambda: None)
    kernel = FakeKernel()
    launch = Launch(kernel, (1, 1), constants={})
    for _ in range(3):
        launch(aligned(4))
    assert len(kernel.through_triton) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_interpreted_kernels_have_no_driver() -> None:
    assert find_driver() is None


def test_sizes() -> None:
    for number in range(1, 70):
        assert power_of_two(number) == triton.next_power_of_2(number)
        for by in (1, 2, 7, 64):
            assert divide_up(number, by) == triton.cdiv(number, by)


# ---- on a device


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(x, out, size, stride, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Vectorised where pointers are multiples of 16 bytes: wrong for others, if the wrong compilation is launched."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    value = tl.load(x + row * stride + columns, mask=columns < size, other=0)
    tl.store(out + row * stride + columns, value * FACTOR, mask=columns < size)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1000, 1000), (1024, 1024), (4096, 4112), (333, 400)])
def test_direct_launches_agree_with_those_of_triton(dtype: torch.dtype, size: int, stride: int) -> None:
    assert find_driver() is not None, launch_obstacle()
    launch = Launch(
        _scale_kernel, (divide_up(size, 256), 3), integers=(size, stride), constants={"FACTOR": 2, "BLOCK": 256}
    )
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(4 * stride + 32, generator=generator, device="cuda").to(dtype)
    side = torch.cuda.Stream()
    for offset, out_offset in ((0, 0), (1, 0), (0, 1), (3, 5), (16, 32)):
        for repeat in range(3):  # through Triton, then twice directly
            out = torch.zeros_like(x)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side if repeat == 2 else torch.cuda.current_stream()):
                launch(x[offset:], out[out_offset:])
            torch.cuda.current_stream().wait_stream(side)
            rows = x[offset : offset + 3 * stride].view(3, stride)[:, :size]
            assert torch.equal(out[out_offset : out_offset + 3 * stride].view(3, stride)[:, :size], rows * 2)
            assert int((out != 0).sum()) == int((rows != 0).sum())
    assert launch._direct and all(direct is not None for direct in launch._direct.values()), "nothing was direct"


@pytest.mark.gpu
@needs_gpu
def test_direct_launches_can_be_captured() -> None:
    assert find_driver() is not None, launch_obstacle()
    launch = Launch(_scale_kernel, (1, 1), integers=(256, 256), constants={"FACTOR": 2, "BLOCK": 256})
    x, out = torch.ones(256, device="cuda"), torch.zeros(256, device="cuda")
    launch(x, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, out)
    x.fill_(5)
    graph.replay()
    assert (out == 10).all()
