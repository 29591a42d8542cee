"""Step times with overlap off and on, interleaved in one run, over a simulated link.

The link is tuned to the machine: communication takes about as long as computation, where overlap can gain most.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.comm import Link
from antiphon.core.sampling import GeneratedOutput, SamplingParams
from antiphon.frontend.llm import LLM
from antiphon.timeline import StepOverlap, StepTimeline, measure_overlap

_ONE_TOKEN = SamplingParams(max_tokens=1)

LINK_LATENCY_S = 100e-6


@dataclass(slots=True)
class Arm:
    """The prefill steps of one setting of `dbo`, one per repeat, each from the slowest rank."""

    steps: list[StepTimeline]
    overlaps: list[StepOverlap]
    outputs: list[GeneratedOutput]

    def median_s(self, name: str) -> float:
        """Median over repeats of a field of `StepOverlap`."""
        return float(statistics.median(getattr(overlap, name) for overlap in self.overlaps))

    def spread_s(self, name: str) -> tuple[float, float]:
        """Smallest and largest value over repeats."""
        values = [getattr(overlap, name) for overlap in self.overlaps]
        return min(values), max(values)


def prefill_step(llm: LLM, prompts: Sequence[str]) -> tuple[StepTimeline, list[GeneratedOutput]]:
    """Run the prompts as one prefill step and return the step of the slowest rank.

    All prompts of a rank must fit into one step. The engine must not have a prefix cache, because the same prompts are
    run repeatedly.
    """
    outputs = llm.generate(list(prompts), _ONE_TOKEN)
    last_steps = [steps[-1] for steps in llm.timelines()]
    return max(last_steps, key=lambda step: step.duration_s), outputs


def tuned_link(llm: LLM, prompts: Sequence[str], *, repeats: int = 5) -> Link:
    """A link over which the serial step's communication takes as long as its computation.

    llm: on the transport that the simulated link will wrap, without a simulated link.
    """
    llm.reconfigure(dbo="off")
    computing_s, num_bytes, num_messages = [], 0, 0
    for repeat in range(repeats + 1):
        step, _ = prefill_step(llm, prompts)
        overlap = measure_overlap(step)
        num_bytes = overlap.num_bytes
        num_messages = sum(event.num_messages for event in step.events if event.kind.value == "sent")
        if repeat:  # the first one is a warm-up
            assert overlap.exposed_s is not None, (
                "a link can be tuned only on CPUs: on GPUs the host does not see arrivals"
            )
            computing_s.append(overlap.time_s - overlap.exposed_s)
    on_wire_s = statistics.median(computing_s) - num_messages * LINK_LATENCY_S
    return Link(bytes_per_s=num_bytes / max(on_wire_s, 1e-3), latency_s=LINK_LATENCY_S)


def simulated_transport(link: Link) -> str:
    """The transport option for `alltoall` over `link`."""
    return f"simulated:alltoall:{link.bytes_per_s / 1e6:.6f}MB/s:{link.latency_s * 1e6:.0f}us"


def interleaved_arms(llm: LLM, prompts: Sequence[str], *, repeats: int) -> dict[str, Arm]:
    """`{"off": ..., "on": ...}`: the same prefill step with overlap off and on, interleaved, after one warm-up each."""
    arms = {dbo: Arm([], [], []) for dbo in ("off", "on")}
    for repeat in range(repeats + 1):
        for dbo, arm in arms.items():
            llm.reconfigure(dbo=dbo)
            step, arm.outputs = prefill_step(llm, prompts)
            if repeat:
                arm.steps.append(step)
                arm.overlaps.append(measure_overlap(step))
    return arms
