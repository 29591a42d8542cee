"""A client of the server that costs little: for many streams at once on the cores that also serve them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["events", "get", "whole"]


@asynccontextmanager
async def _sent(port: int, head: str, body: bytes = b"") -> AsyncIterator[asyncio.StreamReader]:
    """The connection after a request, with the answer's head still to be read; closed at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        writer.write(f"{head} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n".encode())
        writer.write(f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        yield reader
    finally:
        writer.close()


async def _status(reader: asyncio.StreamReader) -> int:
    return int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])


async def events(port: int, path: str, content: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream as they come; to end before its end, close the iterator."""
    async with _sent(port, f"POST {path}", json.dumps(content | {"stream": True}).encode()) as reader:
        status = await _status(reader)
        assert status == 200, status
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    raise AssertionError("the stream ended without [DONE]")


async def whole(port: int, path: str, content: dict[str, Any]) -> dict[str, Any]:
    async with _sent(port, f"POST {path}", json.dumps(content).encode()) as reader:
        status = await _status(reader)
        body = await reader.read()
        assert status == 200, (status, body)
        return json.loads(body)


async def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body."""
    async with _sent(port, f"GET {path}") as reader:
        return await _status(reader), await reader.read()
