"""Overlap measured, not assumed: that steps were dual says which code ran, and not that it hid anything.

S, D, C2 and M are those of `antiphon bench overlap`: interleaved runs, medians of the slowest rank. A whole engine is
timed from `generate` to its return, alternating between two settings of `dbo`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from antiphon import LLM, SamplingParams
from antiphon.bench.overlap.steps import OverlapOptions, check_outputs, run_overlap

ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What overlap must do. most_ratio: of D to S. least_efficiency: (C2 + M - D) / min(C2, M); `None`: no matter."""

    most_ratio: float
    least_efficiency: float | None = None

    def unmet(self, cell: dict[str, Any]) -> list[str]:
        """What of it a cell of the bench's result does not show."""
        ms = {arm: summary["median"] for arm, summary in cell["ms"].items()}
        told = ", ".join(f"{arm} {ms[arm]:.1f}" for arm in ("S", "C", "C2", "M", "D"))
        problems = []
        if (ratio := ms["D"] / ms["S"]) > self.most_ratio:
            problems.append(f"D / S is {ratio:.2f}, at most {self.most_ratio} was claimed ({told} ms)")
        efficiency = cell["overlap_efficiency"]
        if self.least_efficiency is not None and (efficiency is None or efficiency < self.least_efficiency):
            problems.append(
                f"overlap efficiency is {efficiency}, at least {self.least_efficiency} was claimed ({told})"
            )
        return problems


CLAIMS: dict[tuple[str, bool], Claim] = {
    ("host-staged", False): Claim(most_ratio=0.85, least_efficiency=0.5),
    ("allgather", False): Claim(most_ratio=0.9, least_efficiency=0.3),
    ("copy-engine", True): Claim(most_ratio=1.15, least_efficiency=0.3),
}
"""By transport and peer access, for steps of 8,192 tokens of Qwen3-30B-A3B on GPUs; results in benchmarks/results.

The GPU tests hold steps twice as large to them, which a slow host does not limit. Over NVLink M is a tenth of a step,
and the split costs as much as it hides: what is certain is that copy engines hide most of M, and not that D is below S.
NCCL's kernels beside computation hide something of M there, or nothing, as the host is fast or slow; and `alltoall`,
whose host waits for counts, also without peer access (efficiency 0.17): nothing is claimed of these.
"""


def measure_steps(**options: Any) -> dict[str, dict[str, Any]]:
    """The cells of one number of tokens by transport; see `OverlapOptions`. Fails if hidden states differ."""
    defaults: dict[str, Any] = {
        "ranks": 2,
        "routing": "uniform",
        "num_layers": None,
        "seq_len": 2048,
        "micro_batches": 2,
        "repeats": 7,
        "seed": 0,
        "peer_access": True,
        "timeout_s": 60.0,
    }
    result = run_overlap(OverlapOptions(**(defaults | options)))
    check_outputs(result)
    (step,) = result["results"]
    cells: dict[str, dict[str, Any]] = step["transports"]
    return cells


def until_met(measure: Callable[[], list[str]], *, trials: int) -> list[str]:
    """What is unmet in the last trial; there are several, because another program may disturb one."""
    for _ in range(trials):
        problems = measure()
        if not problems:
            break
        print("unmet:", "; ".join(problems))
    return problems


def engine_ratio(llm: LLM, prompts: Sequence[list[int]], *, modes: tuple[str, str], repeats: int) -> float:
    """Median time with the second mode of `dbo` over that with the first: interleaved runs after a warm-up."""
    times_s: dict[str, list[float]] = {mode: [] for mode in modes}
    for repeat in range(repeats + 1):
        for mode in modes:
            llm.reconfigure(dbo=mode)
            start = time.perf_counter()
            llm.generate(list(prompts), ONE_TOKEN)
            if repeat:
                times_s[mode].append(time.perf_counter() - start)
    base_s, other_s = (statistics.median(times_s[mode]) for mode in modes)
    return other_s / base_s
