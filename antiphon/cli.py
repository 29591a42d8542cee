"""The command line: `antiphon generate`, `demo`, `doctor` and `bench`. Reads options, prints results; knows no more."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import antiphon
from antiphon.bench.cli import bench_app
from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import AntiphonError, OptionError
from antiphon.core.policy import DBO_MODES, SPLIT_RULES

if TYPE_CHECKING:
    from antiphon.core.sampling import GeneratedOutput

__all__ = ["app", "main"]

_USAGE_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Mixture-of-Experts inference with dual-batch overlap.",
)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The console script: an error is one line on stderr; exit code 2 for the user's, 1 for the engine's."""
    try:
        app()
    except AntiphonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE_ERROR if isinstance(error, ValueError) else 1)
    except OSError as error:  # a full disk under the output, say
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"antiphon {antiphon.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mixture-of-Experts inference with dual-batch overlap."""


@app.command()
def generate(
    model: Annotated[
        str, typer.Option(help="Folder of a Hugging Face checkpoint, the bundled one, or a preset of dummy weights.")
    ] = BUNDLED_MODEL,
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights, prompts of token ids.")] = "auto",
    num_layers: Annotated[int | None, typer.Option(help="Keep only so many layers.")] = None,
    routing: Annotated[str, typer.Option(help="Of dummy weights: model, uniform, zipf:A or recorded:FILE.")] = "model",
    ranks: Annotated[int, typer.Option(help="Processes that share the experts.")] = 1,
    device: Annotated[
        str, typer.Option(help="auto, cpu, or cuda: one device a rank. auto: cuda if there are enough.")
    ] = "auto",
    dbo: Annotated[str, typer.Option(help=f"Dual-batch overlap: {', '.join(DBO_MODES)}.")] = "auto",
    transport: Annotated[
        str,
        typer.Option(
            help="auto, local, allgather, alltoall, copy-engine, host-staged, shared-memory, "
            "or simulated:INNER:BANDWIDTH:LATENCY."
        ),
    ] = "auto",
    no_peer_access: Annotated[
        bool, typer.Option("--no-peer-access", help="GPUs may not read each other's memory (NCCL_P2P_DISABLE=1).")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float64.")] = "auto",
    split: Annotated[str, typer.Option(help=f"Where a batch is cut: {', '.join(SPLIT_RULES)}.")] = "token",
    micro_batches: Annotated[int, typer.Option(help="Parts of a split step.")] = 2,
    dbo_prefill_token_threshold: Annotated[
        int | None, typer.Option(help="Tokens on the busiest rank from which prefill is split.")
    ] = None,
    dbo_decode_token_threshold: Annotated[
        int | None, typer.Option(help="Tokens on the busiest rank from which decode is split.")
    ] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of one step on one rank.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once on one rank.")] = 256,
    max_model_len: Annotated[int | None, typer.Option(help="Longest text, prompt and output together.")] = None,
    kv_cache_memory: Annotated[int | None, typer.Option(help="Bytes of the KV cache of one rank.")] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory to use; the KV cache gets what is left of it.")
    ] = 0.9,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help='One prompt a line, or JSON lines if it ends in .jsonl, with a "prompt": text or token ids.'),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate for a prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, with a temperature above 0.")] = 0,
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
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed + place)
        for place in range(len(prompts))
    ]
    from antiphon.engine.llm import LLM  # after the checks: it loads the tokenizers

    console = Console(stderr=True)
    with console.status(f"starting ({ranks} ranks)") if console.is_terminal else nullcontext():
        llm = LLM(
            model,
            load_format=load_format,
            num_layers=num_layers,
            routing=routing,
            ranks=ranks,
            device=device,
            dbo=dbo,
            transport=transport,
            peer_access=not no_peer_access,
            dtype=dtype,
            split=split,
            micro_batches=micro_batches,
            dbo_prefill_token_threshold=dbo_prefill_token_threshold,
            dbo_decode_token_threshold=dbo_decode_token_threshold,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_cache_memory=kv_cache_memory,
            gpu_memory_utilization=gpu_memory_utilization,
        )
    with llm:
        for heading, text in llm.config.describe():
            console.print(f"{heading + ':':<11}{text}", highlight=False, markup=False, soft_wrap=True)
        start = time.perf_counter()
        with _progress_bar(console) as progress:
            outputs = llm.generate(prompts, params, progress=progress)
        seconds = time.perf_counter() - start
        stats = llm.stats()
    if as_json:
        _print_json(outputs, stats)
    else:
        _print_texts(outputs)
        console.print(_summary(outputs, stats, seconds), highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo() -> None:
    """Solve word problems and tell a story on 2 ranks, and show what overlap wins over a simulated link."""
    from antiphon.bench.demo import run_demo

    run_demo(Console())


@app.command()
def doctor(
    ranks: Annotated[int | None, typer.Option(help="Processes, one device each. Default: all GPUs, 2 without.")] = None,
    no_peer_access: Annotated[bool, typer.Option("--no-peer-access", help="As if GPUs had no peer access.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, facts and all.")] = False,
) -> None:
    """Say what this machine allows, which transports are usable, and what would help. Starts no ranks."""
    from antiphon.bench.doctor import run_doctor

    raise typer.Exit(run_doctor(Console(), ranks=ranks, peer_access=not no_peer_access, as_json=as_json))


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
    for output in outputs:
        row = {
            "prompt": output.prompt,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
        }
        print(json.dumps(row, ensure_ascii=False))
    print(json.dumps({"stats": stats}))


def _print_texts(outputs: list[GeneratedOutput]) -> None:
    for output in outputs:
        text = f"{output.prompt}{output.text}"
        print(f"{text or ' '.join(map(str, output.token_ids))}\n")


def _summary(outputs: list[GeneratedOutput], stats: dict[str, Any], seconds: float) -> str:
    num_tokens = sum(len(output.token_ids) for output in outputs)
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


if __name__ == "__main__":
    main()
