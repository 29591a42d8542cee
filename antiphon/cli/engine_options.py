"""The options of `LLM` on the command line: declared once, for every command that starts an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from antiphon.cli.arguments import SEVERAL_WORDS, Arguments, OwnOption, Size, read_config_file, separate, size_option
from antiphon.config.aliases import translate
from antiphon.core.bundled import BUNDLED_MODEL
from antiphon.core.errors import OptionError
from antiphon.core.policy import DBO_MODES, SPLIT_RULES

logger = logging.getLogger("antiphon")

_FOREIGN = "antiphon.foreign"
_AUTO = (
    "auto: split from 4096 tokens a rank on GPUs without peer access (or over host-staged), from 512 in prefill and 32 "
    "in decode over a simulated link, else off; the start-up block says why."
)
_EPILOG = (
    "Options of vLLM and vLLM-Ascend are accepted with their meaning here, or refused with what to use instead; "
    "docs/options.md lists them. --enable-dbo is --dbo on from 512 tokens a rank in prefill and 32 in decode."
)


def _declared(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", show_default=False, help="The same as --model.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder of a checkpoint, id of one on the hub, tiny-deepseek (bundled), or a preset of dummy weights."
        ),
    ] = BUNDLED_MODEL,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub's model.")] = None,
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights, prompts of token ids.")] = "auto",
    num_layers: Annotated[int | None, typer.Option(help="Keep only so many layers.")] = None,
    routing: Annotated[str, typer.Option(help="Of dummy weights: model, uniform, zipf:A or recorded:FILE.")] = "model",
    ranks: Annotated[int, typer.Option(help="Processes that share the experts.")] = 1,
    device: Annotated[
        str, typer.Option(help="auto, cpu, or cuda: one device a rank. auto: cuda if there are enough.")
    ] = "auto",
    dbo: Annotated[str, typer.Option(help=f"Dual-batch overlap: {', '.join(DBO_MODES)}. {_AUTO}")] = "auto",
    transport: Annotated[
        str,
        typer.Option(
            help="auto, local, allgather, alltoall, copy-engine, host-staged, shared-memory, "
            "or simulated:INNER:BANDWIDTH:LATENCY."
        ),
    ] = "auto",
    peer_access: Annotated[
        bool, typer.Option(help="Whether GPUs may read each other's memory (NCCL_P2P_DISABLE=1 forbids it too).")
    ] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float64.")] = "auto",
    split: Annotated[str, typer.Option(help=f"Where a batch is cut: {', '.join(SPLIT_RULES)}.")] = "token",
    micro_batches: Annotated[int, typer.Option(help="Parts of a split step.")] = 2,
    dbo_prefill_token_threshold: Annotated[
        int | None, size_option("Tokens on the busiest rank from which prefill is split, under auto too.")
    ] = None,
    dbo_decode_token_threshold: Annotated[
        int | None, size_option("Tokens on the busiest rank from which decode is split, under auto too.")
    ] = None,
    imbalance_ratio: Annotated[
        float,
        typer.Option(
            help="How far from the middle a request boundary may lie, as a share of the tokens; lanes may be longer "
            "than a serial step by twice this share."
        ),
    ] = 0.1,
    min_total_tokens_to_split: Annotated[
        int, size_option("Steps with fewer tokens on the busiest rank are not split.")
    ] = 0,
    min_prefill_tokens_to_split: Annotated[
        int, size_option("Steps with prompts, but with fewer tokens of them there, are not split.")
    ] = 0,
    dbo_start_layer: Annotated[int, typer.Option(help="First layer that runs split.")] = 0,
    dbo_end_layer: Annotated[int | None, typer.Option(help="First layer after it that does not.")] = None,
    max_num_batched_tokens: Annotated[int | None, size_option("Tokens of one step on one rank.")] = None,
    max_num_seqs: Annotated[int, size_option("Requests that run at once on one rank.")] = 256,
    max_model_len: Annotated[int | None, size_option("Longest text, prompt and output together, such as 32k.")] = None,
    block_size: Annotated[int, size_option("Tokens of a block of the KV cache.")] = 16,
    kv_cache_memory: Annotated[
        int | None, size_option("Bytes of the KV cache of one rank, such as 20G.", of_bytes=True)
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory to use; the KV cache gets what is left of it.")
    ] = 0.9,
    prefix_caching: Annotated[bool, typer.Option(help="Share KV blocks between texts that begin alike.")] = True,
    chunked_prefill: Annotated[bool, typer.Option(help="Fill what is left of a step with a part of a prompt.")] = True,
    seed: Annotated[int, typer.Option(help="Of the sampling with a temperature above 0, and of dummy weights.")] = 0,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for another rank, in seconds.")] = 120.0,
    debug_order: Annotated[
        bool, typer.Option("--debug-order", help="Compare the collectives of all ranks before every step.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="A YAML file of options by name; the command line wins.")] = None,
) -> None:
    """Only the signature is used."""


def engine_command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that starts an engine: `engine`, its first parameter, gets the keyword arguments for `LLM`."""

    def register(command: Callable[..., None]) -> Callable[..., None]:
        hints = {**get_type_hints(_declared, include_extras=True), **get_type_hints(command, include_extras=True)}
        engine = signature(_declared).parameters
        own = {key: value for key, value in signature(command).parameters.items() if key != "engine"}

        @wraps(command)
        def run(ctx: typer.Context, **values: Any) -> None:
            options = {key: values.pop(key) for key in engine}
            argument, _ = options.pop("model_argument"), options.pop("config")
            if argument is not None:
                options["model"] = argument
            command(engine=options | ctx.meta[_FOREIGN], **values)

        parameters = [
            parameter.replace(annotation=hints[key], kind=Parameter.KEYWORD_ONLY)
            for key, parameter in [*own.items(), *engine.items()]
        ]
        context = Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context)
        run.__signature__ = signature(command).replace(parameters=[context, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [context, *parameters]}

        class Command(_EngineCommand):
            kinds: ClassVar = {parameter.name: _kind(parameter.annotation) for parameter in parameters}

        app.command(name, cls=Command, epilog=_EPILOG)(run)
        return command

    return register


class _EngineCommand(TyperCommand):
    """Takes options of other engines and the file of `--config` off typer's hands."""

    kinds: ClassVar[dict[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = [
            OwnOption(
                name=param.name,
                kind=self.kinds[param.name],
                flags=tuple(param.opts),
                negative=tuple(param.secondary_opts),
            )
            for param in self.params
            if param.name in self.kinds and param.param_type_name == "option"
        ]
        found = separate(args, options)
        own_names = [option.name for option in options]
        meant = translate(found.foreign, own_names)
        ctx.meta[_FOREIGN] = found.foreign
        ctx.default_map = {
            name: value for name, value in _from_file(found, options, own_names).items() if name not in meant.own
        }
        rest = super().parse_args(ctx, found.ours)
        for name in meant.own:
            if _typed(ctx, name):
                meant.check(name, ctx.params[name])
        model = ctx.params["model_argument"]
        if model is not None and (_typed(ctx, "model") or "model" in meant.own):
            raise OptionError(f"the model is given twice, as {model!r} and as an option; leave one of them out")
        return rest


def _typed(ctx: Any, name: str) -> bool:
    """Whether the option is on the command line itself."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _from_file(found: Arguments, options: list[OwnOption], own_names: list[str]) -> dict[str, Any]:
    """What `--config` says in our options."""
    if found.config is None:
        return {}
    file = read_config_file(found.config, options)
    meant = translate(file.foreign, own_names)
    for name, value in file.own.items():
        meant.check(name, value)
    for note in meant.notes:
        logger.warning(note)
    return meant.unless_given | meant.own | file.own


def _kind(annotation: Any) -> str:
    """The kind of the option with this annotation: `Annotated[int | None, ...]` is a whole number."""
    plain, *marks = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
    if SEVERAL_WORDS in marks:
        return "words"
    for size in (mark.parser for mark in marks if isinstance(getattr(mark, "parser", None), Size)):
        return "bytes" if size.of_bytes else "count"
    if get_origin(plain) in (Union, UnionType):
        (plain,) = [one for one in get_args(plain) if one is not type(None)]
    if get_origin(plain) is list:
        return {str: "texts", int: "wholes"}[get_args(plain)[0]]
    return {bool: "flag", int: "whole", float: "number"}.get(plain, "text")
