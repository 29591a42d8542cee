"""The listening socket: accepted connections send small answers at once, whatever address it is bound to."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from antiphon.server import run
from antiphon.server.options import ServerOptions


async def accepted_nodelay(listening: socket.socket, client_address: tuple[Any, ...]) -> int:
    """TCP_NODELAY of a connection that asyncio, and so uvicorn, accepts from the socket."""
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def see(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(see, sock=listening):
        _, writer = await asyncio.open_connection(*client_address[:2])
        nodelay = await asyncio.wait_for(found, 10)
        writer.close()
    return nodelay


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


HAS_IPV6 = has_ipv6()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::1", "::"])
def test_accepted_connections_do_not_wait_for_an_acknowledgement(host: str) -> None:
    if ":" in host and not HAS_IPV6:
        pytest.skip("this machine has no IPv6")
    listening = run._listen(ServerOptions(host=host, port=0))
    address = listening.getsockname()
    client = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    assert (listening.type, listening.proto) == (socket.SOCK_STREAM, socket.IPPROTO_TCP)
    assert asyncio.run(accepted_nodelay(listening, (client, address[1]))) == 1
