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

from antiphon.cli.arguments import json_object, size_option
from antiphon.cli.prompts import Chat, Prompt, as_chats, format_prompts, read_prompts
from antiphon.cli.start import say, started
from antiphon.core.errors import OptionError
from antiphon.core.lines import JSON_ESCAPES

if TYPE_CHECKING:
    from antiphon.core.sampling import CompletionOutput, GeneratedOutput
    from antiphon.frontend.stats import EngineStats

_NO_THINKING = '{"enable_thinking": false}'


_MODELS_OWN = "Default: generation_config.json of the model"


def generate(
    engine: dict[str, Any],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; can be repeated.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help='A file with one prompt per line. In a .jsonl file each line is an object with a "prompt", text or '
            'token ids, or with the "messages" of a chat.'
        ),
    ] = None,
    max_tokens: Annotated[int, size_option("Maximum number of tokens to generate per prompt.")] = 64,
    min_tokens: Annotated[int, size_option("Minimum number of tokens before an end-of-sequence token is allowed.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help=f"Sampling temperature; 0 is greedy. {_MODELS_OWN}, else 1.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help=f"Sample among the k most likely tokens; 0 is all. {_MODELS_OWN}, else 0.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help=f"Sample among the most likely tokens that reach this probability. {_MODELS_OWN}, else 1."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help=f"Sample among tokens at least this many times as likely as the best. {_MODELS_OWN}, else 0."
        ),
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option(help="Subtracted from the logits of tokens that already appear in the output.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Subtracted from the logits of tokens for each time they appear in the output.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help=f"Divides the logits of tokens in prompt and output; 1 is none. {_MODELS_OWN}, else 1."),
    ] = None,
    logit_bias: Annotated[
        str | None, typer.Option(help="JSON: token ids and what to add to their logits, '{\"5\": -100}'.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Number of results per prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the output; can be repeated.")] = None,
    stop_token_ids: Annotated[
        list[int] | None, typer.Option(help="A token that ends the output; can be repeated.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    skip_special_tokens: Annotated[bool, typer.Option(help="Leave special tokens out of the text.")] = True,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat each prompt as a user message and apply the chat template.")
    ] = False,
    add_generation_prompt: Annotated[
        bool | None,
        typer.Option(help="Append the beginning of an answer. Default: yes, unless the last message is continued."),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="JSON: variables of the chat template, '{\"enable_thinking\": false}'.")
    ] = None,
    continue_final_message: Annotated[
        bool, typer.Option("--continue-final-message", help="Continue the last message of each chat.")
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: report logprobs of the tokens and of this many likeliest tokens.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prompt, and a last one with the statistics.")
    ] = False,
) -> None:
    """Continue prompts."""
    from antiphon.core.sampling import SamplingParams

    prompts: list[Prompt] = [*(prompt or [])]
    if prompts_file is not None:
        prompts += read_prompts(prompts_file)
    if not prompts:
        raise OptionError("there is no prompt", remedy="use --prompt TEXT or --prompts-file FILE")
    if chat:
        prompts = [*as_chats(prompts)]
    template: dict[str, Any] = {
        "chat_template_kwargs": json_object("chat_template_kwargs", chat_template_kwargs, example=_NO_THINKING),
        "continue_final_message": continue_final_message,
        "add_generation_prompt": add_generation_prompt,
    }
    is_formatted = template["chat_template_kwargs"] or continue_final_message or add_generation_prompt is not None
    if is_formatted and not any(isinstance(one, Chat) for one in prompts):
        raise OptionError(
            "--chat-template-kwargs, --continue-final-message and --add-generation-prompt are for chats",
            remedy="add --chat, or leave them out",
            option="chat-template-kwargs",
        )
    bias: Any = json_object("logit_bias", logit_bias, example='{"5": -100}')  # SamplingParams checks its keys
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
            logit_bias=bias or None,
            seed=engine["seed"] + place,
            stop=stop or None,
            stop_token_ids=stop_token_ids or None,
            ignore_eos=ignore_eos,
            skip_special_tokens=skip_special_tokens,
            logprobs=logprobs,
        )
        for place in range(len(prompts))
    ]
    console = Console(stderr=True)
    with started(console, engine) as llm:
        start = time.perf_counter()
        with _progress_bar(console) as progress:
            outputs = llm.generate(format_prompts(prompts, llm, **template), params, progress=progress)
        seconds = time.perf_counter() - start
        stats = llm.stats()
    if as_json:
        _print_json(outputs, stats.to_dict())
    else:
        _print_texts(outputs, prompts)
        say(console, _summary(outputs, stats, seconds))


@contextmanager
def _progress_bar(console: Console) -> Iterator[Callable[[int, int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
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
        print(json.dumps(row, ensure_ascii=not is_utf8).translate(JSON_ESCAPES))
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


def _print_texts(outputs: list[GeneratedOutput], prompts: list[Prompt]) -> None:
    """Print each prompt with its continuation; for a chat the answer."""
    for output, prompt in zip(outputs, prompts, strict=True):
        for one in output.outputs:
            text = one.text if isinstance(prompt, Chat) else f"{output.prompt}{one.text}"
            print(f"{text or ' '.join(map(str, one.token_ids))}\n")


def _summary(outputs: list[GeneratedOutput], stats: EngineStats, seconds: float) -> str:
    from antiphon.machine.advice import format_count

    num_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    plans = ", ".join(f"{count} {plan}" for plan, count in stats["steps_by_plan"].items() if count)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in stats["serial_reasons"].items())
    lines = [
        f"{format_count(len(outputs), 'prompt')}, "
        f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:.0f} tokens/s)",
        f"{stats['steps']} steps: {plans}" + (f" (serial because {reasons})" if reasons else ""),
    ]
    lines += _launches(stats)
    lines += _communication(stats)
    return "\n".join(lines)


def _launches(stats: EngineStats) -> list[str]:
    """A line on replayed steps, and on those that the host had to wait for; empty if there are none of both."""
    lines = []
    replayed, reasons = stats["graphs"]["replayed"], stats["graphs"]["eager_reasons"]
    if replayed:
        eager = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        lines.append(f"{replayed} of {stats['steps']} steps replayed" + (f" (eager because {eager})" if eager else ""))
    if stats["synchronous_reasons"]:
        waited = ", ".join(f"{reason}: {count}" for reason, count in stats["synchronous_reasons"].items())
        lines.append(f"steps that the host waited for: {waited}")
    return lines


def _communication(stats: EngineStats) -> list[str]:
    """A line on how much communication was hidden, or that it was not observed; empty without communication."""
    overlaps = stats["overlap"].values()
    observed = [sums for sums in overlaps if sums["communication_s"] is not None]
    if len(observed) < len(overlaps):
        return [
            f"communication over {stats['transport']}: not observed, for the host does not see when a GPU's data "
            "arrives; antiphon bench overlap measures how much is hidden"
        ]
    communication_s, hidden_s = (sum(sums[name] for sums in observed) for name in ("communication_s", "hidden_s"))
    if not communication_s:
        return []
    return [
        f"communication over {stats['transport']}: {communication_s:.2f} s, "
        f"of which hidden {hidden_s:.2f} s ({hidden_s / communication_s:.0%})"
    ]
