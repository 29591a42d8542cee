"""`antiphon serve`: the OpenAI-compatible server."""

from __future__ import annotations

import logging.config
from typing import Annotated, Any

import typer
from rich.console import Console

from antiphon.cli.arguments import SEVERAL_WORDS, json_object, size_option
from antiphon.cli.start import say


def serve(
    engine: dict[str, Any],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="ANTIPHON_API_KEY",
            show_envvar=True,
            show_default=False,
            help="What clients must send as bearer token. Other users of a machine can see options: use the variable.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Names that requests may use for the model, separated by spaces; answers have the first."),
        SEVERAL_WORDS,
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Origins of web pages whose scripts may read answers (CORS), or '*'. Default: none."),
        SEVERAL_WORDS,
    ] = None,
    allowed_methods: Annotated[
        list[str] | None,
        typer.Option(help="HTTP methods allowed in cross-origin requests. Default: all."),
        SEVERAL_WORDS,
    ] = None,
    allowed_headers: Annotated[
        list[str] | None, typer.Option(help="Request headers allowed in them. Default: all."), SEVERAL_WORDS
    ] = None,
    allow_credentials: Annotated[
        bool,
        typer.Option("--allow-credentials", help="Allow cookies in cross-origin requests; not with '*'."),
    ] = False,
    max_queue: Annotated[int, size_option("Results under way at once; more get 429.")] = 1024,
    request_timeout_s: Annotated[float, typer.Option(help="Longest time for one request.")] = 600.0,
    drain_s: Annotated[float, typer.Option(help="How long open requests may go on after SIGTERM.")] = 30.0,
    max_body_bytes: Annotated[int, size_option("Longest body of a request.", of_bytes=True)] = 8 * 2**20,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(help="Tells reasoning apart from the answer in chats: deepseek_r1, deepseek_v3, glm45 or qwen3."),
    ] = None,
    default_chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            help="JSON: default variables of the chat template, which a request may override one by one, "
            "'{\"enable_thinking\": false}'."
        ),
    ] = None,
    log_format: Annotated[str, typer.Option(help="text or json: one line an event, on stderr.")] = "text",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model to clients of OpenAI's API."""
    from antiphon.config.keywords import OPTION_DEFAULTS, make_config
    from antiphon.server.logs import log_config
    from antiphon.server.options import ServerOptions
    from antiphon.server.run import run_server

    logging.config.dictConfig(log_config(log_format, log_level))
    options = ServerOptions(
        host=host,
        port=port,
        api_key=api_key,
        served_model_names=tuple(served_model_name or [str(engine["model"])]),
        allowed_origins=tuple(allowed_origins or ()),
        allowed_methods=tuple(allowed_methods or "*"),
        allowed_headers=tuple(allowed_headers or "*"),
        allow_credentials=allow_credentials,
        max_queue=max_queue,
        request_timeout_s=request_timeout_s,
        drain_s=drain_s,
        max_body_bytes=max_body_bytes,
        reasoning_parser=reasoning_parser,
        chat_template_kwargs=json_object(
            "default_chat_template_kwargs", default_chat_template_kwargs, example='{"enable_thinking": false}'
        ),
    )
    config = make_config(
        {name: engine[name] for name in OPTION_DEFAULTS},
        {name: value for name, value in engine.items() if name not in OPTION_DEFAULTS},
    )
    console = Console(stderr=True)
    # Lines of JSON stay lines of JSON.
    show = (lambda text: None) if log_format == "json" else lambda text: say(console, text)
    raise typer.Exit(run_server(config, options, say=show))
