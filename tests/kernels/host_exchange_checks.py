"""Compiles the kernel of exchanges through host memory for an H100, without one, where Triton does not interpret.

    python -m tests.kernels.host_exchange_checks

Prints one JSON object: the PTX, for two and for four ranks, with one slab for all peers and with one for each.
"""

from __future__ import annotations

import json

from antiphon.kernels.fused import host_exchange
from antiphon.kernels.slices import MAX_SLICES
from tests.kernels.put_checks import ptx_of

_INTEGERS = ("step", "target", "target_step", "size", "slice_size", "flag", "num_senders", "code", "notice_ns")


def main() -> None:
    types = dict.fromkeys(("source", "box", "bases_W"), "*i64") | dict.fromkeys(("sent", "received"), "*i32")
    types |= dict.fromkeys(_INTEGERS, "i32") | {"word": "i64"}
    found = {}
    for size in (2, 4):
        for same in (True, False):
            constants = {"RANK": 1, "FIRST": 0, "SIZE": size, "SAME": same, "SLICES": MAX_SLICES, "BLOCK": 1024}
            found[f"{size} {same}"] = ptx_of(host_exchange._exchange_kernel, types, constants, num_warps=4)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
