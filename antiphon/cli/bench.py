"""The commands `antiphon bench ...`: options and printing. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from antiphon.cli.arguments import size_option
from antiphon.cli.start import say
from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import OptionError, unknown_value

bench_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Measure communication and overlap. The last line printed is one JSON object.",
)

_DEFAULT_SIZES = {"cpu": "4K..1M", "cuda": "4K..512M"}
_DEFAULT_BESIDE_FROM = {"cpu": "64K", "cuda": "1M"}
_DEFAULT_TOKENS = {"cpu": "128,512", "cuda": "512,2048,8192"}
_NO_BODY = "none"

_TABLE_WIDTH = 160

Ranks = Annotated[int, typer.Option(help="Processes, one device each.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")]
Transports = Annotated[str | None, typer.Option(help="Transports, separated by commas. Default: all that work here.")]
Repeats = Annotated[int, typer.Option(min=1, help="Measured rounds, after two warm-up rounds.")]
NoPeerAccess = Annotated[
    bool,
    typer.Option("--no-peer-access", help="Forbid devices from accessing each other's memory (NCCL_P2P_DISABLE=1)."),
]
TimeoutS = Annotated[float, typer.Option(help="Maximum wait for another rank, in seconds.")]
RangeRatio = Annotated[float, typer.Option(help="How far lengths may deviate from these, as a share; 0: not at all.")]
RequestRate = Annotated[float, typer.Option(help="Requests per second; inf: all at once.")]
MaxConcurrency = Annotated[int | None, size_option("Maximum number of open requests.", least=1)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


@bench_app.command()
def comm(
    ranks: Ranks = 2,
    device: Device = "auto",
    sizes: Annotated[
        str | None, typer.Option(help="Bytes that a rank sends per phase: 4K,1M, or 4K..512M in steps of 4x.")
    ] = None,
    transports: Transports = None,
    beside: Annotated[
        str, typer.Option(help="Computations to run at the same time: grouped, dense, attention, or none.")
    ] = "grouped,dense,attention",
    beside_from: Annotated[str | None, typer.Option(help="Smallest size to measure beside computation.")] = None,
    hidden_size: Annotated[int, typer.Option(min=8, help="Hidden size: numbers per token, in bfloat16.")] = 2048,
    repeats: Repeats = 10,
    no_peer_access: NoPeerAccess = False,
    timeout_s: TimeoutS = 120.0,
    json_file: JsonFile = None,
) -> None:
    """Measure dispatch and combine. Alone, and beside computation of equal length, for every size and transport."""
    from antiphon.bench.comm.bodies import BODY_NAMES
    from antiphon.bench.comm.exchanges import CommOptions, print_exchanges, run_comm
    from antiphon.bench.conditions import check_writable, parse_names, parse_sizes, write_json

    bodies = [name for name in parse_names(beside, "beside", (_NO_BODY, *BODY_NAMES)) if name != _NO_BODY]
    kind, peer_access, names = _resolved(ranks, device, transports, no_peer_access)
    options = CommOptions(
        ranks=ranks,
        device=kind,
        transports=names,
        sizes=parse_sizes(sizes or _DEFAULT_SIZES[kind]),
        beside=bodies,
        beside_from=parse_sizes(beside_from or _DEFAULT_BESIDE_FROM[kind], "beside-from")[0],
        hidden_size=hidden_size,
        repeats=repeats,
        peer_access=peer_access,
        timeout_s=timeout_s,
    )
    check_writable(json_file, "json")
    result = run_comm(options)
    print_exchanges(result, _console())
    write_json(result, json_file)


@bench_app.command()
def overlap(
    model: Annotated[
        str,
        typer.Argument(help="A preset, the folder of a checkpoint, or the bundled model. Weights are always dummies."),
    ] = BUNDLED_MODEL,
    ranks: Ranks = 2,
    device: Device = "auto",
    tokens: Annotated[str | None, typer.Option(help="Tokens per rank and step, separated by commas.")] = None,
    transports: Transports = None,
    routing: Annotated[str, typer.Option(help="Routing: uniform, zipf:A, recorded:FILE, or model.")] = "uniform",
    dtype: Annotated[str, typer.Option(help="Dtype: auto, float32, bfloat16, float64.")] = "auto",
    num_layers: Annotated[int | None, typer.Option(min=1, help="Use only the first N layers of the model.")] = None,
    seq_len: Annotated[int, size_option("Tokens per text; a step prefills whole texts.", least=1)] = 2048,
    micro_batches: Annotated[int, typer.Option(min=2, help="Number of parts of a split step.")] = 2,
    repeats: Repeats = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, tokens and routing.")] = 0,
    no_peer_access: NoPeerAccess = False,
    timeout_s: TimeoutS = 120.0,
    json_file: JsonFile = None,
) -> None:
    """Compare serial and overlapped prefill steps. Also measures their parts alone; all transports are interleaved."""
    from antiphon.bench.conditions import check_writable, parse_counts, write_json
    from antiphon.bench.overlap.steps import OverlapOptions, check_outputs, print_steps, run_overlap
    from antiphon.config.engine_config import DTYPES

    if dtype not in ("auto", *DTYPES):
        raise unknown_value("dtype", dtype, ("auto", *DTYPES))
    kind, peer_access, names = _resolved(ranks, device, transports, no_peer_access)
    options = OverlapOptions(
        model=model,
        ranks=ranks,
        device=kind,
        tokens=parse_counts(tokens or _DEFAULT_TOKENS[kind], "tokens"),
        transports=names,
        routing=routing,
        dtype=dtype if dtype != "auto" else {"cpu": "float32", "cuda": "bfloat16"}[kind],
        num_layers=num_layers,
        seq_len=seq_len,
        micro_batches=micro_batches,
        repeats=repeats,
        seed=seed,
        peer_access=peer_access,
        timeout_s=timeout_s,
    )
    check_writable(json_file, "json")
    result = run_overlap(options)
    print_steps(result, _console())
    write_json(result, json_file)
    check_outputs(result)


@bench_app.command()
def decode(
    model: Annotated[
        str,
        typer.Argument(help="A preset, the folder of a checkpoint, or the bundled model. Weights are always dummies."),
    ] = BUNDLED_MODEL,
    ranks: Ranks = 2,
    device: Device = "auto",
    sequences: Annotated[str, typer.Option(help="Sequences per rank, separated by commas.")] = "1,16,64,256",
    context: Annotated[str, typer.Option(help="Tokens of each prompt, separated by commas.")] = "1024",
    plans: Annotated[str, typer.Option(help="Plans to interleave: serial, dual, eager.")] = "serial,dual,eager",
    steps: Annotated[int, typer.Option(min=1, help="Steps timed in a row; of eager ones a quarter.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, after a warm-up round.")] = 5,
    kernels: Annotated[
        int, typer.Option(min=0, help="Profile captured steps and print this many of their kernels; 0: none.")
    ] = 0,
    transport: Annotated[str, typer.Option(help="Transport of the engine, or auto.")] = "auto",
    routing: Annotated[str, typer.Option(help="Routing: uniform, zipf:A, recorded:FILE, or model.")] = "uniform",
    dtype: Annotated[str, typer.Option(help="Dtype: auto, float32, bfloat16, float64.")] = "auto",
    num_layers: Annotated[int | None, typer.Option(min=1, help="Use only the first N layers of the model.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, prompts and routing.")] = 0,
    no_peer_access: NoPeerAccess = False,
    timeout_s: TimeoutS = 120.0,
    json_file: JsonFile = None,
) -> None:
    """Time the decode steps of the engine: serial, with overlap, eager. Beside them, the least time they could take."""
    from antiphon.bench.conditions import check_writable, parse_counts, parse_names, resolve_measured_device, write_json
    from antiphon.bench.decode.cells import print_decode, run_decode
    from antiphon.bench.decode.options import PLANS, DecodeOptions
    from antiphon.config.resolve import resolve_peer_access

    options = DecodeOptions(
        model=model,
        ranks=ranks,
        device=resolve_measured_device(device, ranks, tuple(_DEFAULT_TOKENS)),
        sequences=parse_counts(sequences, "sequences"),
        contexts=parse_counts(context, "context"),
        plans=parse_names(plans, "plans", PLANS),
        steps=steps,
        repeats=repeats,
        kernels=kernels,
        transport=transport,
        routing=routing,
        dtype=dtype,
        num_layers=num_layers,
        seed=seed,
        peer_access=resolve_peer_access(not no_peer_access),
        timeout_s=timeout_s,
    )
    check_writable(json_file, "json")
    result = run_decode(options)
    print_decode(result, _console())
    write_json(result, json_file)


@bench_app.command()
def serve(
    base_url: Annotated[str | None, typer.Option(help="Address of the server, instead of --host and --port.")] = None,
    host: Annotated[str, typer.Option(help="Host of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the server.")] = 8000,
    backend: Annotated[str, typer.Option(help="API: openai, vllm (the same), or openai-chat.")] = "openai",
    endpoint: Annotated[
        str | None,
        typer.Option(help="Path of the requests. Default: /v1/completions, or /v1/chat/completions for openai-chat."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's name on the server. Default: the first one served.")
    ] = None,
    dataset_name: Annotated[str, typer.Option(help="Dataset: random, sharegpt or custom.")] = "random",
    dataset_path: Annotated[
        Path | None, typer.Option(help='File of the dataset. For custom: JSON lines, each with a "prompt".')
    ] = None,
    num_prompts: Annotated[int, size_option("Number of requests.", least=1)] = 1000,
    random_input_len: Annotated[int, size_option("Tokens per random prompt.", least=1)] = 1024,
    random_output_len: Annotated[int, size_option("Maximum number of tokens to generate per prompt.", least=1)] = 128,
    random_range_ratio: RangeRatio = 0.0,
    random_vocab_size: Annotated[int, size_option("Random prompts have token ids below this.")] = 4000,
    random_as_text: Annotated[
        bool,
        typer.Option(
            "--random-as-text", help="Send random words, for servers that take no token ids. Always on for chats."
        ),
    ] = False,
    output_len: Annotated[
        int | None,
        size_option("Maximum number of tokens to generate per prompt of a file; overrides the file.", least=1),
    ] = None,
    request_rate: RequestRate = float("inf"),
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson arrivals; lower is burstier, higher is more even.")
    ] = 1.0,
    max_concurrency: MaxConcurrency = None,
    num_warmups: Annotated[int, size_option("Number of warm-up requests, within --max-concurrency.", least=0)] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Always generate all tokens.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    percentile_metrics: Annotated[str, typer.Option(help="Latencies to print; choose from the default.")] = (
        "ttft,tpot,itl,e2el"
    ),
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles of them, separated by commas.")] = "90,99",
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts, lengths and arrivals.")] = 0,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the result to a JSON file.")] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="With --save-result: include figures and texts of every request.")
    ] = False,
    result_dir: Annotated[Path | None, typer.Option(help="Folder of that file; created if missing.")] = None,
    result_filename: Annotated[
        str | None, typer.Option(help="Name of that file. Default: made from load, model and date.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="Maximum silence of the server, in seconds.")] = 600.0,
) -> None:
    """Measure throughput and latencies of an OpenAI-compatible server. The key is read from OPENAI_API_KEY."""
    import os

    from antiphon.bench.conditions import parse_names, parse_numbers, write_json
    from antiphon.bench.serve.load import METRICS, ServeOptions, run_serve
    from antiphon.bench.serve.result import check_result_path, print_serve, result_path, without_details, write_result
    from antiphon.bench.serve.workload import Workload

    endpoints = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
    if backend not in endpoints:
        raise unknown_value("backend", backend, endpoints)
    if save_detailed and not save_result:
        raise OptionError("--save-detailed writes nothing alone", remedy="add --save-result", option="save-detailed")
    options = ServeOptions(
        base_url=base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}",
        endpoint=endpoint or endpoints[backend],
        model=model,
        api_key=os.environ.get("OPENAI_API_KEY") or None,
        workload=Workload(
            dataset=dataset_name,
            path=dataset_path,
            num_prompts=num_prompts,
            input_len=random_input_len,
            output_len=random_output_len,
            range_ratio=random_range_ratio,
            vocab_size=random_vocab_size,
            as_text=random_as_text,
            file_output_len=output_len,
            seed=seed,
        ),
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        num_warmups=num_warmups,
        ignore_eos=ignore_eos,
        temperature=temperature,
        percentile_metrics=tuple(parse_names(percentile_metrics, "percentile-metrics", tuple(METRICS))),
        percentiles=tuple(parse_numbers(metric_percentiles, "metric-percentiles")),
        timeout_s=timeout_s,
        detailed=save_detailed,
    )
    if save_result:
        check_result_path(result_dir, result_filename)
    result = run_serve(options)
    print_serve(result, options, _console())
    try:
        write_json(without_details(result), None)
    finally:
        if save_result:
            write_result(result, result_path(result, result_dir, result_filename))
    if not result["completed"]:
        raise typer.Exit(1)


def _resolved(ranks: int, device: str, transports: str | None, no_peer_access: bool) -> tuple[str, bool, list[str]]:
    """The kind of device, whether peers may be accessed, and the transports. Raises `OptionError` if they cannot be."""
    from antiphon.bench.conditions import check_ranks, resolve_measured_device, resolve_transports
    from antiphon.config.resolve import resolve_peer_access

    check_ranks(ranks)
    kind = resolve_measured_device(device, ranks, tuple(_DEFAULT_TOKENS))
    peer_access = resolve_peer_access(not no_peer_access)
    return kind, peer_access, resolve_transports(transports, device=kind, ranks=ranks, peer_access=peer_access)


def _console() -> Console:
    """A console on stderr, wide enough that tables written to a file are not cut off."""
    console = Console(stderr=True)
    console.width = max(console.width, _TABLE_WIDTH)
    return console


def dbo(
    engine: dict[str, Any],
    modes: Annotated[str, typer.Option(help="Values of --dbo to compare with the first, separated by commas.")] = (
        "off,on"
    ),
    num_prompts: Annotated[int, size_option("Requests per run.", least=1)] = 64,
    random_input_len: Annotated[int, size_option("Tokens per prompt.", least=1)] = 512,
    random_output_len: Annotated[int, size_option("Tokens to generate per prompt.", least=1)] = 32,
    random_range_ratio: RangeRatio = 0.0,
    request_rate: RequestRate = float("inf"),
    capacity_share: Annotated[
        float | None,
        typer.Option(
            help="Instead of a rate: a share of the rate that the first mode reaches with all requests at once."
        ),
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson arrivals; lower is burstier, higher is more even.")
    ] = 1.0,
    max_concurrency: MaxConcurrency = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each mode, after a warm-up run.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Serve the same load with overlap off and on. One engine, interleaved runs. The last line is one JSON object."""
    from antiphon.bench.conditions import check_writable, parse_names, write_json
    from antiphon.bench.dbo import DboOptions, print_dbo, run_dbo
    from antiphon.bench.serve.workload import Workload
    from antiphon.config.keywords import make_config
    from antiphon.config.options import OPTION_DEFAULTS

    if engine["dbo"] != OPTION_DEFAULTS["dbo"]:
        raise OptionError(
            f"--dbo {engine['dbo']} is what this command varies",
            remedy=f"use --modes {engine['dbo']},...",
            option="dbo",
        )
    config = make_config(engine)
    options = DboOptions(
        workload=Workload(
            num_prompts=num_prompts,
            input_len=random_input_len,
            output_len=random_output_len,
            range_ratio=random_range_ratio,
            seed=engine["seed"],
        ),
        modes=tuple(parse_names(modes, "modes")),
        repeats=repeats,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        capacity_share=capacity_share,
    )
    check_writable(json_file, "json")
    console = _console()
    result = run_dbo(config, options, say=lambda text: say(console, text))
    print_dbo(result, console)
    write_json(result, json_file)
