"""The installed Triton's real launcher without a GPU, in a process of its own.

    python -m tests.kernels.launcher_checks FOLDER

Kernels are compiled for an H100 and loaded into a driver that runs nothing and writes down every launch (fake_cuda.c).
Prints one JSON object: for each kernel what the driver got through Triton, and by the direct launches after it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

_BYTES = {"i32": 4, "i64": 8}
_STREAM = 4242


@triton.jit
def _mixed_kernel(x, out, size, one, many, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNUSED: tl.constexpr):
    """Triton makes a constant of an integer that is 1, between others that stay arguments."""
    columns = tl.arange(0, LEFT)
    value = tl.load(x + columns * one, mask=columns < size, other=0)
    tl.store(out + columns, value + many * RIGHT, mask=columns < size)


def build_driver(folder: Path) -> ctypes.CDLL:
    import triton.backends.nvidia

    include = Path(next(iter(triton.backends.nvidia.__path__))) / "include"
    source, library = Path(__file__).with_name("fake_cuda.c"), folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    options = ["-shared", "-fPIC", "-O1", f"-I{include}", f"-Wl,-soname,{library.name}"]  # Triton finds it by its name
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    driver = ctypes.CDLL(str(library))
    driver.take_launches.restype = ctypes.c_char_p
    return driver


def use_driver(driver: ctypes.CDLL) -> None:
    """Let torch and Triton believe in one H100, on which every tensor of the CPU lies."""
    import torch
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(
        multi_processor_count=132,
        shared_memory_per_multiprocessor=228 << 10,
        regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=2048,
    )
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]
    torch._C._cuda_getCurrentRawStream = lambda device: _STREAM  # type: ignore[attr-defined]
    triton.runtime.driver.set_active(CudaDriver())
    make = CudaLauncher.__init__

    def make_and_tell(self: Any, src: Any, metadata: Any) -> None:
        kinds = [kind for kind in src.signature.values() if kind != "constexpr"]
        sizes = [8 if kind[0] == "*" else _BYTES[kind] for kind in kinds] + [8, 8]  # scratch memory, twice
        driver.expect_parameters(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        make(self, src, metadata)

    CudaLauncher.__init__ = make_and_tell


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    driver = build_driver(folder)
    use_driver(driver)
    import torch

    from antiphon.kernels.fused import activation, launch, norm_rope, pack, router, small_experts
    from antiphon.kernels.fused.direct import find_driver, launch_obstacle
    from antiphon.kernels.router import Scoring

    def memory(*shape: int, dtype: torch.dtype = torch.bfloat16, odd: int = 0) -> torch.Tensor:
        """At a multiple of 16 bytes, or `odd` numbers behind one."""
        size = torch.Size(shape).numel()
        whole = torch.zeros(size + 32, dtype=dtype)
        start = (-whole.data_ptr() % 16) // whole.element_size() + odd
        return whole[start : start + size].view(shape)

    found: dict[str, Any] = {}
    through: list[Any] = []
    real = launch.Launch._through_triton

    def watched(self: Any, tensors: Any) -> Any:
        through.append(self)
        return real(self, tensors)

    launch.Launch._through_triton = watched  # type: ignore[method-assign]

    def check(name: str, call: Callable[[], object]) -> None:
        """`call` launches one kernel, with the same tensors each time."""
        driver.take_launches()
        lines, counts = [], []
        for _ in range(3):
            through.clear()
            call()
            lines.append(driver.take_launches().decode())
            counts.append(len(through))
        found[name] = {"launches": lines, "through_triton": counts}

    for odd in (0, 3):
        x, out, weight = memory(7, 48), memory(7, 48, odd=odd), memory(48)
        norm = norm_rope._norm(7, 1, 48, (48, 0), None, False, 1e-6, False)
        check(f"norm, {odd} numbers behind", lambda x=x, o=out, w=weight, n=norm: n(x, x, x, w, o, o))  # type: ignore[misc]
    for size, many in ((20, 1 << 40), (16, 5)):
        constants = {"LEFT": 32, "RIGHT": True, "UNUSED": None}
        mixed = launch.Launch(_mixed_kernel, (3, 2), integers=(size, 1, many), constants=constants, num_warps=2)
        numbers = memory(32, dtype=torch.int64)
        check(f"mixed, {size}", lambda m=mixed, x=numbers: m(x, x))  # type: ignore[misc]
    one_row = norm_rope._norm(1, 1, 48, (48, 0), 48, True, 1e-6, False)
    row, sums = memory(1, 48), memory(1, 48)
    check("norm of one row, added", lambda: one_row(row, row, row, weight, row, sums))
    cos, sin, heads = memory(7, 8), memory(7, 8), memory(7, 3, 16)
    rope = norm_rope._rope(7, 3, 8, (48, 16), (48, 16), False, False)
    check("rope", lambda: rope(heads, cos, sin, heads))
    gate_up, ends = memory(7, 64), memory(2, dtype=torch.int32)
    activated = memory(7, 32)
    check("activation", lambda: activation.launch_gated_silu(gate_up, activated, ends))
    packed = [memory(7, 48), memory(7, 4, dtype=torch.float32), memory(7, 4, dtype=torch.int32)]
    tokens = [memory(7, 48), memory(7, 4, dtype=torch.float32), memory(7, 4, dtype=torch.int64)]
    check("pack", lambda: pack.pack_rows_fused(*packed, *tokens))
    parts = [memory(7, 48) for _ in range(9)]
    check("sum of parts", lambda: pack._add(7 * 48, 3, False)(*parts))
    places, rows, x = memory(7, 2, dtype=torch.int32), memory(14, dtype=torch.int32), memory(7, 64)
    ids = memory(7, 2, dtype=torch.int64)
    place = small_experts._place(7, 2, (2, 1), 2, 0)
    check("experts: place", lambda: place(ids, places, rows, ends))
    weights, sums_of_pairs = (memory(2, 256, 64), memory(2, 64, 128)), memory(14, 64)
    up_tile, down_tile = small_experts.choose_tiles(7, torch.bfloat16, large_shared=True)
    up, down = small_experts._up(64, 2, 64, 128, up_tile), small_experts._down(2, 64, 128, down_tile)
    acts = memory(14, 128)
    check("experts: up", lambda: up(x, weights[0], rows, ends, acts))
    check("experts: down", lambda: down(acts, weights[1], ends, sums_of_pairs))
    logits = memory(7, 16, dtype=torch.float32)
    empty = torch.Tensor.new_empty
    kept: dict[Any, torch.Tensor] = {}  # what a call makes has the same address in the next one
    torch.Tensor.new_empty = lambda self, *size, **options: kept.setdefault(  # type: ignore[method-assign]
        (size, str(options)), empty(self, *size, **options)
    )
    check(
        "router",
        lambda: router.choose_experts_fused(logits, 4, Scoring.SOFTMAX, bias_E=None, normalize=True, scale=1.0),
    )
    report = {
        "triton": triton.__version__,
        "obstacle": launch_obstacle(),
        "has_driver": find_driver() is not None,
        "stream": _STREAM,
        "kernels": found,
    }
    print(json.dumps(report), flush=True)
    os._exit(0)  # torch would look for its devices


if __name__ == "__main__":
    main()
