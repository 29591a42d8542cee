"""The routes of the server. `service` decides whether to accept a request, and `generation` answers it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import antiphon
from antiphon.core.errors import RequestError
from antiphon.server.body import read_body
from antiphon.server.chat import ChatJob
from antiphon.server.completions import CompletionJob
from antiphon.server.errors import ApiError, JsonAnswer, refusal
from antiphon.server.generation import Generation
from antiphon.server.guard import Guard
from antiphon.server.protocol import Body, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from antiphon.server.service import Phase, Service

_EXPOSED_HEADERS = ("x-request-id", "retry-after")  # scripts of web pages may read these besides the standard ones


def make_app(service: Service) -> FastAPI:
    """The application of one server."""
    app = FastAPI(
        title="Antiphon",
        version=antiphon.__version__,
        docs_url=None,
        redoc_url=None,
        default_response_class=JsonAnswer,
        exception_handlers={ApiError: _answer_api_error, HTTPException: _answer_http_error},
    )
    app.add_middleware(Guard, service=service)
    if service.options.allowed_origins:
        # Outside the guard: preflight requests need no key, and scripts can read refusals.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.options.allowed_origins,
            allow_methods=service.options.allowed_methods,
            allow_headers=service.options.allowed_headers,
            allow_credentials=service.options.allow_credentials,
            expose_headers=_EXPOSED_HEADERS,
        )
    max_bytes = service.options.max_body_bytes

    @app.post("/v1/completions", openapi_extra=_body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionRequest, max_bytes=max_bytes)
        return Generation(CompletionJob(body, service))

    @app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatRequest, max_bytes=max_bytes)
        return Generation(ChatJob(body, service))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = service.options.served_model_names
        return {"object": "list", "data": [_model(service, name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @app.get("/health")
    async def health() -> Response:
        """Liveness: 503 while the server is starting, and after a rank has failed."""
        return _phase(service, Phase.SERVING, Phase.DRAINING)

    @app.get("/ready")
    async def ready() -> Response:
        """Readiness: 200 while new requests are accepted."""
        return _phase(service, Phase.SERVING)

    @app.get("/metrics")
    async def metrics() -> Response:
        stats_by_rank = await service.statistics()
        return Response(service.metrics.render(stats_by_rank), media_type=service.metrics.content_type)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": antiphon.__version__}

    @app.post("/tokenize", openapi_extra=_body_schema(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, TokenizeRequest, max_bytes=max_bytes)
        return await _tokenize(service, body)

    @app.post("/detokenize", openapi_extra=_body_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, str]:
        body = await read_body(request, DetokenizeRequest, max_bytes=max_bytes)
        return await _detokenize(service, body)

    _document_bodies(app)
    return app


def _phase(service: Service, *good: Phase) -> Response:
    content = {"status": "ok" if service.phase is Phase.SERVING else str(service.phase)}
    if service.detail:
        content["detail"] = service.detail
    return JsonAnswer(content, status_code=200 if service.phase in good else 503)


def _model(service: Service, name: str) -> dict[str, Any]:
    config = service.engine.config
    return {
        "id": name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "antiphon",
        "root": service.model_name,
        "parent": None,
        "max_model_len": config.max_model_len,
    }


async def _tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "a request needs either prompt or messages", remedy="send one of them", option="prompt")
    engine = service.engine
    try:
        if body.prompt is not None:
            ids = await service.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        else:
            ids = await service.encode_chat(body.messages or [], body)
    except RequestError as error:
        raise refusal(error, frozenset(TokenizeRequest.model_fields), prompt_field="prompt") from None
    texts = [engine.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.config.max_model_len, "tokens": ids, "token_strs": texts}


async def _detokenize(service: Service, body: DetokenizeRequest) -> dict[str, str]:
    service.check_model(body.model)
    engine = service.engine
    largest, limit = max(body.tokens, default=0), engine.config.model.vocab_size - 1
    if largest > limit:
        remedy = f"use token ids from 0 to {limit}"
        raise ApiError(400, f"tokens contains {largest}", remedy=remedy, option="tokens", value=largest)
    if not engine.tokenizer.has_text:
        raise ApiError(400, "tokens have no text", limit="with dummy weights there is no tokenizer", option="tokens")
    return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens)}


# ---- errors


async def _answer_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.answer()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer an error of the router, such as an unknown path, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    fact, remedy = {
        404: (f"there is no {path} on this server", "GET /openapi.json lists all paths"),
        405: (f"{path} does not support {request.method}", f"use {headers.get('Allow', 'another method')}"),
    }.get(error.status_code, (str(error.detail), ""))
    return ApiError(error.status_code, fact, remedy=remedy, headers=headers).answer()


# ---- the OpenAPI document


def _body_schema(model: type[Body]) -> dict[str, Any]:
    """The schema of a body. FastAPI cannot infer it, because `read_body` reads the body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _document_bodies(app: FastAPI) -> None:
    """Add the schemas that `_body_schema` refers to."""
    models = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
    _, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
