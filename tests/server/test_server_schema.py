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


def fuzz(server: ServerProcess, num_examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: dict[str, set[int]] = {}
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in modes if operation.body else modes[:1]:

            @settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                body = case.body
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
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert {200, 400} <= seen[path], (path, seen[path])
    assert server.get("/health").status_code == 200
    assert server.metric("antiphon:num_requests_open") == server.metric("antiphon:kv_cache_usage_perc") == 0


def test_no_request_of_the_document_breaks_the_server(server: ServerProcess) -> None:
    fuzz(server, num_examples=12)


@pytest.mark.slow
def test_no_request_of_the_document_breaks_the_server_in_many_tries(server: ServerProcess) -> None:
    fuzz(server, num_examples=int(os.environ.get("ANTIPHON_FUZZ_EXAMPLES", "300")))
