"""`antiphon demo`: the main job on the bundled model, and what overlap gains over a simulated link."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from antiphon.accuracy.evaluate import word_problems
from antiphon.bench.overlap.trial import Arm, interleaved_arms, simulated_transport, tuned_link
from antiphon.config.describe import describe_config
from antiphon.core.sampling import SamplingParams
from antiphon.frontend.llm import LLM

NUM_PROBLEMS = 32
NUM_SHOWN = 3
NUM_TRIAL_PROMPTS = 64
STORY = "Once upon a time there was a"
REPEATS = 7


def run_demo(console: Console) -> None:
    """Print the demo, which takes about half a minute on two cores."""
    problems = word_problems()[:NUM_PROBLEMS]
    prompts = [problem.prompt for problem in problems]
    trial_prompts = [problem.prompt for problem in word_problems()[:NUM_TRIAL_PROMPTS]]

    console.print("Measuring this machine: 2 ranks, plain alltoall between processes ...")
    with LLM(ranks=2, device="cpu", dbo="off", transport="alltoall", prefix_caching=False) as llm:
        link = tuned_link(llm, trial_prompts)

    with LLM(ranks=2, device="cpu", dbo="on", transport=simulated_transport(link), prefix_caching=False) as llm:
        for heading, text in describe_config(llm.config):
            console.print(Text(f"  {heading + ':':<11}{text}"), soft_wrap=True)
        console.print()
        solutions = llm.generate([*prompts, STORY], _sampling(len(prompts)))
        for problem, solution in list(zip(problems, solutions, strict=False))[:NUM_SHOWN]:
            console.print(Text(problem.question, style="bold"), soft_wrap=True)
            console.print(Text(solution.text.strip() + "\n"), soft_wrap=True)
        story = solutions[-1]
        console.print(Text.assemble((STORY, "bold"), f"{story.text}\n"), soft_wrap=True)
        num_solved = sum(problem.solved_by(s.text) for problem, s in zip(problems, solutions, strict=False))
        stats = llm.stats()
        steps = ", ".join(f"{count} {plan}" for plan, count in stats["steps_by_plan"].items() if count)
        reasons = ", ".join(stats["serial_reasons"])
        console.print(
            f"simulated link: {num_solved} of {len(problems)} word problems solved; steps: {steps}"
            + (f" (serial at the end, where only the story goes on: {reasons})" if reasons else ""),
            soft_wrap=True,
        )
        console.print()
        arms = interleaved_arms(llm, trial_prompts, repeats=REPEATS)

    num_tokens = sum(len(output.prompt_token_ids) for output in arms["on"].outputs)
    console.print(
        f"simulated link ({link}), tuned so that communication takes as long as computation here;\n"
        f"simulated link: one prefill step of {num_tokens} tokens on 2 ranks, off and on interleaved, "
        f"median of {REPEATS} (smallest to largest):",
        highlight=False,
        soft_wrap=True,
    )
    for dbo, arm in arms.items():
        console.print(_arm_line(dbo, arm), highlight=False, soft_wrap=True)
    ratio = arms["on"].median_s("time_s") / arms["off"].median_s("time_s")
    same = [o.token_ids for o in arms["on"].outputs] == [o.token_ids for o in arms["off"].outputs]
    console.print(
        f"simulated link: dbo on takes [bold]{ratio:.2f}[/bold] of the time of dbo off (ideal 0.5); "
        f"tokens are {'equal' if same else 'DIFFERENT'}",
        highlight=False,
        soft_wrap=True,
    )


def _sampling(num_problems: int) -> list[SamplingParams]:
    """Parameters: greedy for the problems, sampled for the story, which would repeat itself otherwise."""
    greedy = SamplingParams(max_tokens=100, temperature=0.0)
    return [*[greedy] * num_problems, SamplingParams(max_tokens=80, temperature=0.8, top_p=0.95, seed=0)]


def _arm_line(dbo: str, arm: Arm) -> str:
    low_s, high_s = arm.spread_s("time_s")
    communication_s, hidden_s = arm.median_s("communication_s"), arm.median_s("hidden_s")
    return (
        f"simulated link, dbo {dbo:<3}: step {arm.median_s('time_s') * 1e3:6.1f} ms "
        f"({low_s * 1e3:.1f} to {high_s * 1e3:.1f}), communication {communication_s * 1e3:6.1f} ms, "
        f"of which hidden {hidden_s * 1e3:6.1f} ms ({hidden_s / max(communication_s, 1e-9):.0%})"
    )
