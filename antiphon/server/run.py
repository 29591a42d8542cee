"""The life of a server process: listen, start the ranks, serve, drain, exit.

The server listens before the ranks start, so that probes see "starting". A rank that fails ends the process. SIGTERM
and SIGINT drain, and a second signal exits at once. Two signals in quick succession count as one: `timeout`, for
example, signals its child and then the whole group.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

import antiphon
from antiphon.config.describe import describe_config
from antiphon.config.engine_config import EngineConfig
from antiphon.core.errors import OptionError
from antiphon.frontend.async_engine import AsyncEngine
from antiphon.server.app import make_app
from antiphon.server.logs import log_event
from antiphon.server.options import ServerOptions
from antiphon.server.service import Service

logger = logging.getLogger("antiphon")

_FAILED = 1
_SHOWN_DEAD_S = 2.0  # how long /health reports that a rank has failed before the process exits
_LAST_ANSWERS_S = 3.0
_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that the clients close them
_BACKLOG = 2048
_SAME_SIGNAL_S = 0.5


def run_server(engine: EngineConfig, options: ServerOptions, *, say: Callable[[str], None]) -> int:
    """Serve until a signal or a failure, and return the exit code. `say` prints the start-up block, line by line.

    Raises what `AsyncEngine` raises if the engine cannot start, and `OptionError` if the address cannot be used.
    """
    with _listen(options) as listening:
        return asyncio.run(_serve(engine, options, listening, say))


class _StopError(Exception):
    """Raised inside a start that a signal has cancelled."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which raise signals again at the end and spoil the exit code."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    config: EngineConfig, options: ServerOptions, listening: socket.socket, say: Callable[[str], None]
) -> int:
    service = Service(options)
    server = _Server(
        uvicorn.Config(
            make_app(service),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(_LAST_ANSWERS_S),
        )
    )
    signals = _Signals()
    http = asyncio.create_task(server.serve(sockets=[listening]))
    host, port = listening.getsockname()[:2]
    log_event("listening", host=host, port=port)
    engine: AsyncEngine | None = None
    try:
        engine = await _start(config, service, signals)
        if engine is None:
            return signals.exit_code
        for heading, text in describe_config(engine.config):
            say(f"{heading + ':':<11}{text}")
        for sentence in [*engine.config.without_effect(), *options.without_effect()]:
            logger.warning(sentence)
        service.serve(engine)
        gc.collect()
        gc.freeze()  # repeatedly scanning the many objects of the libraries would stall all streams
        log_event("serving", model=service.model_name, ranks=config.ranks, version=antiphon.__version__)
        await _first(signals.first.wait(), service.failed.wait())
        if service.failed.is_set():
            log_event("the engine has failed", level=logging.ERROR, error=service.failure)
            await _first(signals.first.wait(), timeout_s=_SHOWN_DEAD_S)
            return _FAILED
        await _drain(service, signals)
        return _FAILED if service.failed.is_set() else signals.exit_code
    finally:
        service.cut_all()
        server.should_exit = True
        await http
        if engine is not None:
            await engine.close()
        service.close()


async def _start(config: EngineConfig, service: Service, signals: _Signals) -> AsyncEngine | None:
    """The engine, or `None` if a signal came first."""

    def on_start(what: str) -> None:
        if signals.first.is_set():
            raise _StopError
        service.detail = what

    starting = asyncio.create_task(asyncio.to_thread(AsyncEngine, config, on_start=on_start))
    await _first(asyncio.shield(starting), signals.first.wait())
    if not signals.first.is_set():
        return await starting
    service.drain()
    await _first(asyncio.shield(starting), signals.second.wait())
    if not starting.done():
        os._exit(signals.exit_code)  # a thread, in a download for example, cannot be stopped; the ranks notice our exit
    with suppress(Exception):  # the start ends when it next reports progress; if it succeeds first, close the engine
        await (await starting).close()
    return None


async def _drain(service: Service, signals: _Signals) -> None:
    service.drain()
    drain_s = service.options.drain_s
    log_event("draining", num_open=service.num_open, limit=drain_s)
    await _first(service.idle.wait(), signals.second.wait(), service.failed.wait(), timeout_s=drain_s)
    if service.num_open:
        log_event("open requests are cut off", level=logging.WARNING, num_open=service.num_open)


class _Signals:
    """SIGTERM and SIGINT on the running event loop. exit_code: 0, or 128 plus the number of a second signal."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self.exit_code = 0
        self._first_s = 0.0
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take, number)

    def _take(self, number: signal.Signals) -> None:
        now = asyncio.get_running_loop().time()
        if not self.first.is_set():
            self._first_s = now
            self.first.set()
        elif now - self._first_s > _SAME_SIGNAL_S:
            self.exit_code = 128 + number
            self.second.set()


async def _first(*waits: Awaitable[Any], timeout_s: float | None = None) -> None:
    """Return when one of these has ended, or after `timeout_s`, and cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _listen(options: ServerOptions) -> socket.socket:
    """Open a listening socket whose protocol is TCP explicitly: only then does asyncio set TCP_NODELAY on connections.

    Without it, answers on a kept-alive connection take 40 ms longer: the body is a second write, which Nagle's
    algorithm holds back until the client acknowledges the head.
    """
    host, port = options.host, options.port
    try:
        family, kind, protocol, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        return socket.socket(family, kind, protocol, fileno=listening.detach())
    except (OSError, UnicodeError) as error:
        option = "port" if isinstance(error, OSError) and error.errno == errno.EADDRINUSE else "host"
        raise OptionError(
            f"cannot listen on {host} port {port}",
            limit=str(error),
            remedy="use another --host or --port",
            option=option,
            value=getattr(options, option),
        ) from None
