"""Draw a recorded serial step above a recorded dual one, and save the times of all repeats.

    python -m tools.draw_overlap docs/overlap.svg benchmarks/results/overlap-cpu-simulated.json

Records on two CPU processes over a simulated link that takes as long as the computation. Needs matplotlib.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from antiphon import LLM
from antiphon.accuracy.evaluate import word_problems
from antiphon.bench.overlap.trial import Arm, interleaved_arms, simulated_transport, tuned_link
from antiphon.core.lines import split_lines
from antiphon.runtime import EventKind
from antiphon.timeline import StepTimeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_PROMPTS = 64
REPEATS = 15

LANE_COLORS = ("#3566a8", "#d1772c")
WIRE_ALPHA = 0.35


def main(picture: Path, results: Path) -> None:
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    matplotlib.use("svg")
    prompts = [problem.prompt for problem in word_problems()[:NUM_PROMPTS]]
    with LLM(ranks=2, device="cpu", transport="alltoall", prefix_caching=False) as llm:
        link = tuned_link(llm, prompts)
    with LLM(ranks=2, device="cpu", transport=simulated_transport(link), prefix_caching=False) as llm:
        arms = interleaved_arms(llm, prompts, repeats=REPEATS)
        transport = str(llm.config.transport)
    write_results(results, arms, transport)
    steps = {dbo: sorted(arm.steps, key=lambda step: step.duration_s)[REPEATS // 2] for dbo, arm in arms.items()}

    pyplot.rcParams["font.family"] = "sans-serif"
    pyplot.rcParams["svg.hashsalt"] = "antiphon"
    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(10, 3.4), height_ratios=(2, 4))
    draw_step(axes[0], steps["off"], "serial")
    draw_step(axes[1], steps["on"], "dual")
    axes[1].set_xlabel(f"ms of one prefill step; simulated link, {link}")
    handles = [
        Patch(color=LANE_COLORS[0], label="lane 0 computes"),
        Patch(color=LANE_COLORS[1], label="lane 1 computes"),
        Patch(color="#888888", alpha=WIRE_ALPHA, label="tokens on the wire"),
    ]
    figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 1.01))
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(picture, metadata={"Date": None})


def write_results(path: Path, arms: dict[str, Arm], transport: str) -> None:
    """One JSON object: conditions, and for each arm the step of every repeat."""
    ratio = arms["on"].median_s("time_s") / arms["off"].median_s("time_s")
    result = {
        "what": "one prefill step, overlap off and on interleaved, simulated link; the slower rank of each repeat",
        "date": date.today().isoformat(),
        "device": processor_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": "tiny-deepseek float32",
        "ranks": 2,
        "tokens": sum(len(output.prompt_token_ids) for output in arms["off"].outputs),
        "transport": transport,
        "tokens_equal": [o.token_ids for o in arms["off"].outputs] == [o.token_ids for o in arms["on"].outputs],
        "dual_over_serial": round(ratio, 3),
        "arms": {
            dbo: {
                "median": {name: arm.median_s(name) for name in ("time_s", "communication_s", "exposed_s", "hidden_s")},
                "repeats": [asdict(overlap) for overlap in arm.overlaps],
            }
            for dbo, arm in arms.items()
        },
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "arms"}))


def processor_name() -> str:
    """Model and number of the processors."""
    info = Path("/proc/cpuinfo")
    lines = split_lines(info.read_text()) if info.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{os.cpu_count()} x {', '.join(sorted(names)) or platform.processor()}"


def draw_step(axes: Axes, step: StepTimeline, title: str) -> None:
    """One row for the compute and one for the wire of each lane."""
    lanes = sorted({event.lane for event in step.events})
    for lane in lanes:
        color = LANE_COLORS[lane]
        compute, wire = intervals(step, lane)
        axes.broken_barh(compute, (2 * lane + 0.1, 0.8), color=color)
        axes.broken_barh(wire, (2 * lane + 1.25, 0.5), color=color, alpha=WIRE_ALPHA)
    labels = [text for lane in lanes for text in (f"lane {lane}", "wire")]
    axes.set_yticks([row + 0.5 for row in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_ylabel(f"{title}\n{step.duration_s * 1e3:.0f} ms", rotation=0, ha="right", va="center", labelpad=24)
    axes.spines[["top", "right"]].set_visible(False)


def intervals(step: StepTimeline, lane: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(start, length) in ms of computing and of communicating."""
    compute, wire, sent = [], [], {}
    start_ns = 0
    for event in step.events:
        if event.lane != lane:
            continue
        if event.kind in (EventKind.START, EventKind.SWITCH_IN, EventKind.ARRIVED):
            start_ns = event.time_ns
        elif event.kind in (EventKind.SWITCH_OUT, EventKind.WAIT, EventKind.END):
            compute.append(span(step, start_ns, event.time_ns))
        if event.kind is EventKind.SENT:
            sent[event.pending] = event.time_ns
        elif event.kind is EventKind.ARRIVED and event.ready_ns is not None:
            wire.append(span(step, sent[event.pending], event.ready_ns))
    return compute, wire


def span(step: StepTimeline, start_ns: int, stop_ns: int) -> tuple[float, float]:
    return (start_ns - step.start_ns) * 1e-6, (stop_ns - start_ns) * 1e-6


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tools.draw_overlap PICTURE.svg RESULTS.json")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
