"""Requests that schemathesis makes from the server's own OpenAPI document: no 5xx, no hang, nothing left open."""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.support.server import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

_MOST_TOKENS = 6  # valid requests may ask for thousands; what is fuzzed is the server


def fuzz_operation(operation: Any, mode: Any, num_examples: int, seen: dict[str, set[int]]) -> None:
    """seen: statuses by path; more are put in."""

    @settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and mode is schemathesis.GenerationMode.POSITIVE:
            body.pop("model", None)  # a text, but not any
        if isinstance(body, dict) and case.path.startswith("/v1/"):
            asked = body.get("max_tokens")
            if asked is None or (isinstance(asked, int) and asked > _MOST_TOKENS):
                body["max_tokens"] = _MOST_TOKENS
        answer = case.call(timeout=30)
        seen.setdefault(case.path, set()).add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    ask()


def fuzz(server: ServerProcess, num_examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        fuzz_operation(operation, schemathesis.GenerationMode.POSITIVE, num_examples, seen)
        if operation.body:
            fuzz_operation(operation, schemathesis.GenerationMode.NEGATIVE, num_examples, seen)
    posts = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
    assert all(400 in seen[path] for path in posts), seen
    if num_examples >= 100:  # few have parameters that are all within their ranges
        assert all(200 in seen[path] for path in posts), seen
    assert server.get("/health").status_code == 200
    assert server.metric("antiphon:num_requests_open") == server.metric("antiphon:kv_cache_usage_perc") == 0


def test_no_request_of_the_document_breaks_the_server(server: ServerProcess) -> None:
    fuzz(server, num_examples=12)


@pytest.mark.slow
def test_no_request_of_the_document_breaks_the_server_in_many_tries(server: ServerProcess) -> None:
    fuzz(server, num_examples=int(os.environ.get("ANTIPHON_FUZZ_EXAMPLES", "300")))
