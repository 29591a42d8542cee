"""`antiphon generate`: prompts in, texts out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from antiphon.bench.size_option import size_option
from antiphon.cli.start import say, started
from antiphon.core.errors import OptionError

if TYPE_CHECKING:
    from antiphon.core.sampling import CompletionOutput, GeneratedOutput

__all__ = ["generate"]


def generate(
    engine: dict[str, Any],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help='One prompt a line, or JSON lines if it ends in .jsonl, with a "prompt": text or token ids.'),
    ] = None,
    max_tokens: Annotated[int, size_option("Most tokens to generate for a prompt.")] = 64,
    min_tokens: Annotated[int, size_option("No end before so many tokens.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample among tokens that are this times as likely as the best.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Off the logits of tokens generated before.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, times how often.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides logits of tokens seen before; 1: none.")] = 1.0,
    logit_bias: Annotated[
        str | None, typer.Option(help="JSON: token ids and what to add to their logits, '{\"5\": -100}'.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Results for each prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the output; may be given several times.")
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None, typer.Option(help="A token that ends the output; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: logprobs of the tokens and of so many likeliest.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a prompt on stdout, and a last one with the statistics.")
    ] = False,
) -> None:
    """Continue prompts."""
    from antiphon.core.sampling import SamplingParams

    prompts: list[str | list[int]] = [*(prompt or [])]
    if prompts_file is not None:
        prompts += _read_prompts(prompts_file)
    if not prompts:
        raise OptionError("there is no prompt; use --prompt TEXT or --prompts-file FILE")
    params = [
        SamplingParams(
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            logit_bias=_logit_bias(logit_bias),
            seed=engine["seed"] + place,
            stop=stop or None,
            stop_token_ids=stop_token_ids or None,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        )
        for place in range(len(prompts))
    ]
    console = Console(stderr=True)
    with started(console, engine) as llm:
        start = time.perf_counter()
        with _progress_bar(console) as progress:
            outputs = llm.generate(prompts, params, progress=progress)
        seconds = time.perf_counter() - start
        stats = llm.stats()
    if as_json:
        _print_json(outputs, stats)
    else:
        _print_texts(outputs)
        say(console, _summary(outputs, stats, seconds))


def _logit_bias(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError:
        raise OptionError(f'--logit-bias {text!r} is not JSON; use an object such as {{"5": -100}}') from None


def _read_prompts(path: Path) -> list[str | list[int]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--prompts-file {path} cannot be read ({error}); pass a text file in UTF-8") from error
    if not any(line.strip() for line in lines):
        raise OptionError(f"--prompts-file {path} holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [line.rstrip("\r") for line in lines if line.strip()]
    prompts: list[str | list[int]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) and not (prompt and isinstance(prompt, list)):
            raise OptionError(
                f'--prompts-file {path}, line {number} is not a JSON object with a text "prompt", or one of token ids'
            )
        prompts.append(prompt)
    return prompts


@contextmanager
def _progress_bar(console: Console) -> Iterator[Callable[[int, int, int], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("prompts", total=None, tokens=0)

        def update(num_finished: int, num_prompts: int, num_tokens: int) -> None:
            bar.update(task, completed=num_finished, total=num_prompts, tokens=num_tokens)

        yield update


def _print_json(outputs: list[GeneratedOutput], stats: dict[str, Any]) -> None:
    # Outside UTF-8 stdout has escapes of its own for what it lacks, which are no JSON.
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    for output in outputs:
        row = {"prompt": output.prompt} | _row(output.outputs[0])
        if len(output.outputs) > 1:
            row["outputs"] = [_row(one) for one in output.outputs]
        print(json.dumps(row, ensure_ascii=not is_utf8))
    print(json.dumps({"stats": stats}))


def _row(output: CompletionOutput) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        row["logprobs"] = [{token: asdict(found) for token, found in place.items()} for place in output.logprobs]
    return row


def _print_texts(outputs: list[GeneratedOutput]) -> None:
    for output in outputs:
        for one in output.outputs:
            text = f"{output.prompt}{one.text}"
            print(f"{text or ' '.join(map(str, one.token_ids))}\n")


def _summary(outputs: list[GeneratedOutput], stats: dict[str, Any], seconds: float) -> str:
    num_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    plans = ", ".join(f"{count} {plan}" for plan, count in stats["steps_by_plan"].items() if count)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in stats["serial_reasons"].items())
    lines = [
        f"{len(outputs)} {'prompt' if len(outputs) == 1 else 'prompts'}, "
        f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:.0f} tokens/s)",
        f"{stats['steps']} steps: {plans}" + (f" (serial because {reasons})" if reasons else ""),
    ]
    communication_s = sum(sums["communication_s"] for sums in stats["overlap"].values())
    if communication_s > 0:
        hidden_s = sum(sums["hidden_s"] for sums in stats["overlap"].values())
        lines.append(
            f"communication over {stats['transport']}: {communication_s:.2f} s, "
            f"of which hidden {hidden_s:.2f} s ({hidden_s / communication_s:.0%})"
        )
    return "\n".join(lines)
