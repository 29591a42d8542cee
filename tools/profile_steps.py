"""Where a step's time goes on the device: the arms C2 and D of `antiphon bench overlap`, profiled.

    python -m tools.profile_steps deepseek-v2-lite --transport host-staged --tokens 8192 --no-peer-access

For every rank and arm it prints how long the kernels of the compute stream ran and how long the stream was idle. Idle
time is split by the kernel after the gap: either the host launched it after the gap began (the host was late), or it
was already launched and waited for an arrival. The kernels with the longest total time are named. Needs GPUs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from antiphon.bench.overlap.rank import Trial, use_transport
from antiphon.bench.overlap.steps import OverlapOptions
from antiphon.bench.parts import TransportPart, part_of
from antiphon.bench.ranks import run_on_ranks
from antiphon.comm import RankGroup
from antiphon.comm.needs import peer_environment

_PARTS = {"S": (1, TransportPart.WHOLE), "C2": (2, TransportPart.COMPUTE_ONLY), "D": (2, TransportPart.WHOLE)}
_ROUNDS = 4  # the last one is profiled
_NUM_NAMED = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--transport", default="host-staged")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--no-peer-access", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    options = OverlapOptions(
        model=given.model,
        ranks=given.ranks,
        device="cuda",
        tokens=[given.tokens],
        transports=[given.transport],
        routing="uniform",
        dtype="bfloat16",
        num_layers=given.num_layers,
        seq_len=2048,
        micro_batches=2,
        repeats=1,
        seed=0,
        peer_access=not given.no_peer_access,
        timeout_s=60,
    )
    by_rank = run_on_ranks(
        "tools.profile_steps:profile_arms",
        ranks=given.ranks,
        device="cuda",
        options=asdict(options),
        environment=peer_environment(peer_access=options.peer_access),
    )
    for rank, arms in enumerate(by_rank):
        for arm, found in arms.items():
            named = ", ".join(f"{name[:40]} {time_ms:.1f}" for name, time_ms in found["kernels_ms"].items())
            print(
                f"rank {rank}, {arm}: {found['elapsed_ms']:.1f} ms, kernels {found['busy_ms']:.1f}, host late "
                f"{found['host_late_ms']:.1f}, waited {found['waited_ms']:.1f}; copies {found['copies_ms']:.1f}"
            )
            print(f"    {named}")
    if given.json:
        given.json.write_text(json.dumps({"options": asdict(options), "ranks": by_rank}, indent=1))


def profile_arms(group: RankGroup, device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """On one rank: {arm: figures in ms}."""
    trial = Trial(group, device, options)
    (transport,) = trial.transports.values()
    found = {}
    for arm, (num_lanes, part) in _PARTS.items():
        parts = trial.parts(options["tokens"][0], num_lanes)
        for turn in range(_ROUNDS):
            use_transport(trial.model, transport)
            trial.run_step(parts)  # leaves rows in the buffers for C2
            use_transport(trial.model, part_of(transport, part))
            torch.cuda.synchronize()
            group.all_gather_object(turn)
            if turn < _ROUNDS - 1:
                trial.run_step(parts)
                continue
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
                trial.run_step(parts)
                torch.cuda.synchronize()
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                recorded.export_chrome_trace(file.name)
                found[arm] = figures(json.loads(Path(file.name).read_text())["traceEvents"])
    return found


def figures(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one step's trace. Trace times are in us."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    copies = [e for e in events if e.get("cat") in ("gpu_memcpy", "gpu_memset")]
    launched_at = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
    by_stream: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for kernel in kernels:
        by_stream[kernel["args"]["stream"]].append(kernel)
    compute = sorted(max(by_stream.values(), key=lambda own: sum(e["dur"] for e in own)), key=lambda e: e["ts"])
    late = waited = 0.0
    for before, after in pairwise(compute):
        gap_start = before["ts"] + before["dur"]
        gap = after["ts"] - gap_start
        if gap > 0:
            launch = launched_at.get(after["args"]["correlation"], 0.0)
            host = min(gap, max(0.0, launch - gap_start))
            late, waited = late + host, waited + gap - host
    by_name: dict[str, float] = defaultdict(float)
    for kernel in compute:
        by_name[kernel["name"]] += kernel["dur"] / 1e3
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:_NUM_NAMED]
    return {
        "elapsed_ms": (compute[-1]["ts"] + compute[-1]["dur"] - compute[0]["ts"]) / 1e3,
        "busy_ms": sum(e["dur"] for e in compute) / 1e3,
        "host_late_ms": late / 1e3,
        "waited_ms": waited / 1e3,
        "copies_ms": sum(e["dur"] for e in copies) / 1e3,
        "num_kernels": len(compute),
        "kernels_ms": dict(largest),
    }


if __name__ == "__main__":
    main()
