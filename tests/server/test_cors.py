"""A browser's view: what a script of a web page may ask for and read, with CORS off and on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from antiphon.server.app import make_app
from antiphon.server.options import ServerOptions
from antiphon.server.service import Service
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

KEY = "sesame-0123"
PAGE = "https://chat.example"
OTHER_PAGE = "https://evil.example"
PATH = "/v1/completions"
BODY = {"prompt": "Once", "max_tokens": 3}
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def opened() -> Iterator[ServerProcess]:
    words = ["--ranks", "1", "--max-body-bytes", "2k", "--max-queue", "1"]
    words += ["--allowed-origins", PAGE, "http://localhost:3000", "--allow-credentials"]
    with ServerProcess(*words, ANTIPHON_API_KEY=KEY) as started:
        yield started


def preflight(server: ServerProcess, origin: str) -> httpx.Response:
    """The preflight request that a browser sends, without a key, before one with a key and JSON."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return httpx.options(server.url + PATH, headers={"origin": origin, **asked}, timeout=60)


def may_read(answer: httpx.Response, origin: str = PAGE) -> bool:
    """Whether the browser hands the answer to a script that sent cookies."""
    allowed = answer.headers.get("access-control-allow-origin")
    if allowed is None:
        return False
    assert allowed == origin and answer.headers["access-control-allow-credentials"] == "true"
    assert "Origin" in answer.headers["vary"]  # caches keep the answers for two pages apart
    return True


def test_preflight_needs_no_key_and_names_what_may_be_sent(opened: ServerProcess) -> None:
    for origin in (PAGE, "http://localhost:3000"):
        answer = preflight(opened, origin)
        assert answer.status_code == 200 and may_read(answer, origin)
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert "authorization" in allowed and "content-type" in allowed


def test_answers_are_readable_and_so_is_their_id(opened: ServerProcess) -> None:
    answer = opened.post(PATH, json=BODY, headers={"origin": PAGE, **BEARER})
    assert answer.status_code == 200 and may_read(answer)
    assert "x-request-id" in answer.headers["access-control-expose-headers"] and answer.headers["x-request-id"]
    assert may_read(opened.get("/health", headers={"origin": PAGE}))


def test_a_stream_is_readable(opened: ServerProcess) -> None:
    with httpx.stream(
        "POST", opened.url + PATH, json=BODY | {"stream": True}, headers={"origin": PAGE, **BEARER}, timeout=60
    ) as answer:
        assert answer.status_code == 200 and may_read(answer)
        assert answer.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        (PATH, BODY, {}, 401),
        (PATH, BODY | {"model": "nobody"}, BEARER, 404),
        ("/v1/nothing", BODY, BEARER, 404),
        (PATH, BODY | {"temperature": -1}, BEARER, 400),
        (PATH, BODY | {"prompt": "word " * 1000}, BEARER, 413),
    ],
)
def test_refusals_are_readable(
    path: str, body: dict[str, object], headers: dict[str, str], status: int, opened: ServerProcess
) -> None:
    answer = opened.post(path, json=body, headers={"origin": PAGE, **headers})
    assert answer.status_code == status and may_read(answer)
    assert answer.json()["error"]["message"]


def test_a_full_server_is_readable(opened: ServerProcess) -> None:
    long = BODY | {"max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", opened.url + PATH, json=long, headers=BEARER, timeout=60) as first:
        events = first.iter_bytes()
        next(events)
        answer = opened.post(PATH, json=BODY, headers={"origin": PAGE, **BEARER})
    assert answer.status_code == 429 and may_read(answer)
    assert "retry-after" in answer.headers["access-control-expose-headers"]


def test_a_fault_of_the_server_is_readable() -> None:
    async def ask() -> httpx.Response:
        service = Service(ServerOptions(allowed_origins=(PAGE,), allow_credentials=True))

        async def fail() -> None:
            raise ValueError("a fault")

        service.statistics = fail  # type: ignore[method-assign,assignment]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(service)), base_url="http://a") as client:
            return await client.get("/metrics", headers={"origin": PAGE})

    answer = asyncio.run(ask())
    assert answer.status_code == 500 and may_read(answer)


def test_other_pages_get_no_leave(opened: ServerProcess) -> None:
    refused = preflight(opened, OTHER_PAGE)
    assert refused.status_code == 400 and not may_read(refused)
    assert not may_read(opened.post(PATH, json=BODY, headers={"origin": OTHER_PAGE}))


def test_without_the_option_nothing_is_said_of_it(server: ServerProcess) -> None:
    asked = preflight(server, PAGE)
    assert asked.status_code == 405
    answers = [asked, server.post(PATH, json=BODY, headers={"origin": PAGE})]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]
