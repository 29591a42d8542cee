"""Compiles the kernels of one-sided exchanges for an H100, without one, in a process that does not interpret Triton.

    python -m tests.kernels.put_checks

Prints one JSON object: the PTX of both kernels, for two and for four ranks. ptxas has accepted it too.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from antiphon.kernels.fused import put

_H100 = GPUTarget("cuda", 90, 32)


def ptx_of(kernel: Any, types: dict[str, str], constants: dict[str, int], *, num_warps: int) -> str:
    """types: of the parameters. Pointers are multiples of 16, as in the transport."""
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types.get(name, "")[:1] == "*"
        },
    )
    compiled = triton.compile(source, target=_H100, options={"num_warps": num_warps})
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


def main() -> None:
    pointers = {"source": "*i64", "bases_W": "*i64", "arrived": "*i32", "epoch": "*i32"}
    integers = dict.fromkeys(("step", "target", "size", "flag"), "i32")
    found = {}
    for size in (2, 4):
        constants = {"RANK": 1, "FIRST": 0, "SIZE": size, "BLOCK": 512}
        found[f"put {size}"] = ptx_of(put._put_kernel, pointers | integers, constants, num_warps=4)
        waits = {"flags_W": "*i32", "epoch": "*i32", "word": "i64", "code": "i32", "notice_ns": "i32"}
        found[f"wait {size}"] = ptx_of(put._wait_kernel, waits, {"RANK": 1, "SIZE": size}, num_warps=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
