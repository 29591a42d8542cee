"""Adds the options of `LLM` to every command that starts an engine."""

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

from antiphon.cli.arguments import (
    SEVERAL_WORDS,
    SIZE_LIST,
    Arguments,
    OwnOption,
    Size,
    read_config_file,
    separate,
    size_option,
)
from antiphon.config.aliases import translate
from antiphon.config.options import OPTIONS
from antiphon.core.errors import OptionError
from antiphon.core.options import Option
from antiphon.core.policy import DEFAULT_DECODE_THRESHOLD, DEFAULT_PREFILL_THRESHOLD

logger = logging.getLogger("antiphon")

_FOREIGN = "antiphon.foreign"
_EPILOG = (
    "Options of vLLM and vLLM-Ascend are accepted with their meaning here, or refused with what to use instead; "
    f"docs/options.md lists them. --enable-dbo is --dbo on from {DEFAULT_PREFILL_THRESHOLD} tokens per rank in prefill "
    f"and {DEFAULT_DECODE_THRESHOLD} in decode."
)


def engine_parameters() -> dict[str, Parameter]:
    """Parameters for typer: every option of an engine, MODEL, and --config."""
    model_argument = typer.Argument(metavar="MODEL", show_default=False, help="The same as --model.")
    config = typer.Option(help="A YAML file of options by name; the command line wins.")
    return {
        "model_argument": _parameter("model_argument", None, str | None, model_argument),
        **{name: _parameter(name, one.default, one.type, *_typer_option(one)) for name, one in OPTIONS.items()},
        "config": _parameter("config", None, Path | None, config),
    }


def _typer_option(one: Option) -> tuple[Any, ...]:
    """The option for typer, and a mark if it takes several words."""
    if one.size == "list":
        return typer.Option(help=one.help, metavar="SIZES"), SIZE_LIST
    if one.size:
        return (size_option(one.help, of_bytes=one.size == "bytes"),)
    return (typer.Option(help=one.help),)


def _parameter(name: str, default: Any, kind: Any, *shown: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[(kind, *shown)])


def engine_command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose first parameter, `engine`, receives the keyword arguments for `LLM`."""

    def register(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        engine = engine_parameters()
        own = {key: value for key, value in signature(command).parameters.items() if key != "engine"}

        @wraps(command)
        def run(ctx: typer.Context, **values: Any) -> None:
            options = {key: values.pop(key) for key in engine}
            argument, _ = options.pop("model_argument"), options.pop("config")
            if argument is not None:
                options["model"] = argument
            command(engine=options | ctx.meta[_FOREIGN], **values)

        parameters = [
            parameter.replace(annotation=hints[key], kind=Parameter.KEYWORD_ONLY) for key, parameter in own.items()
        ] + list(engine.values())
        context = Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context)
        run.__signature__ = signature(command).replace(parameters=[context, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [context, *parameters]}

        class Command(_EngineCommand):
            kinds: ClassVar = {parameter.name: _kind(parameter.annotation) for parameter in parameters}

        app.command(name, cls=Command, epilog=_EPILOG)(run)
        return command

    return register


class _EngineCommand(TyperCommand):
    """Handles options of other engines and the file of `--config` before typer parses the rest."""

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
            raise OptionError(
                f"the model is given twice, as {model!r} and as an option",
                remedy="leave one of them out",
                option="model",
                value=model,
            )
        return rest


def _typed(ctx: Any, name: str) -> bool:
    """Whether the option is on the command line itself."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _from_file(found: Arguments, options: list[OwnOption], own_names: list[str]) -> dict[str, Any]:
    """The options in the `--config` file, translated to ours."""
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
    if SIZE_LIST in marks:
        return "sizes"
    for size in (mark.parser for mark in marks if isinstance(getattr(mark, "parser", None), Size)):
        return "bytes" if size.of_bytes else "count"
    if get_origin(plain) in (Union, UnionType):
        (plain,) = [one for one in get_args(plain) if one is not type(None)]
    if get_origin(plain) is list:
        return {str: "texts", int: "wholes"}[get_args(plain)[0]]
    return {bool: "flag", int: "whole", float: "number"}.get(plain, "text")
