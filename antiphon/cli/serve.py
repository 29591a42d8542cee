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
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all addresses.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="ANTIPHON_API_KEY",
            show_envvar=True,
            show_default=False,
            help="Bearer token that clients must send. Prefer the variable: other users can see command lines.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Names that requests may use for the model, separated by spaces; answers carry the first."),
        SEVERAL_WORDS,
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Origins of web pages whose scripts may use the server (CORS), or '*'. Default: none."),
        SEVERAL_WORDS,
    ] = None,
    allowed_methods: Annotated[
        list[str] | None,
        typer.Option(help="HTTP methods allowed in cross-origin requests. Default: all."),
        SEVERAL_WORDS,
    ] = None,
    allowed_headers: Annotated[
        list[str] | None,
        typer.Option(help="Request headers allowed in cross-origin requests. Default: all."),
        SEVERAL_WORDS,
    ] = None,
    allow_credentials: Annotated[
        bool,
        typer.Option("--allow-credentials", help="Allow cookies in cross-origin requests; not with '*'."),
    ] = False,
    max_queue: Annotated[int, size_option("Maximum number of open results; beyond it, requests get 429.")] = 1024,
    request_timeout_s: Annotated[float, typer.Option(help="Maximum time for one request, in seconds.")] = 600.0,
    drain_s: Annotated[float, typer.Option(help="How long open requests may go on after SIGTERM, in seconds.")] = 30.0,
    max_body_bytes: Annotated[int, size_option("Maximum size of a request's body.", of_bytes=True)] = 8 * 2**20,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(help="Separate reasoning from the answer in chats: deepseek_r1, deepseek_v3, glm45 or qwen3."),
    ] = None,
    default_chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            help="JSON: variables of the chat template; a request can override each of them, "
            "'{\"enable_thinking\": false}'."
        ),
    ] = None,
    log_format: Annotated[str, typer.Option(help="Log format: text or json, one line per event on stderr.")] = "text",
    log_level: Annotated[str, typer.Option(help="Log level: debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model over OpenAI's HTTP API."""
    from antiphon.config.keywords import make_config
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
    config = make_config(engine)
    console = Console(stderr=True)
    # Lines of JSON stay lines of JSON.
    show = (lambda text: None) if log_format == "json" else lambda text: say(console, text)
    raise typer.Exit(run_server(config, options, say=show))
