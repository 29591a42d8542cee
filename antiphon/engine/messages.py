"""The messages between the frontend and the workers: msgpack over ZeroMQ.

Every message to the workers carries a wave: a number that is the same for all ranks and grows by one with each
message. A rank puts the newest wave it has seen into its agreement row. Ranks stop stepping only when none has work
and all have seen the same wave, so no rank sleeps through a message that another one acts on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import zmq

from antiphon.comm import DataPath
from antiphon.config.cache import CacheSize
from antiphon.config.graph_sizes import CaptureReport
from antiphon.core.policy import OverlapPolicy
from antiphon.engine.scheduling.request import Request, TokenOutput
from antiphon.timeline import StepTimeline

LOADING = "loading the model"


class Starting(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What this rank is doing while it starts."""

    what: str
    # while it loads the model: bytes it has read, and bytes it needs
    bytes_read: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        if not self.num_bytes:
            return self.what
        size = f"{self.num_bytes / 1e9:.1f} GB" if self.num_bytes >= 1e9 else f"{self.num_bytes / 1e6:.1f} MB"
        return f"{self.what}: {self.bytes_read / self.num_bytes:.0%} of {size}"


class Throttle:
    """Forwards the first and the last report of each stage, and at most one per `interval_s` in between."""

    def __init__(self, send: Callable[[Starting], None], *, interval_s: float = 0.2) -> None:
        self._send = send
        self._interval_s = interval_s
        self._last: tuple[str, float] = ("", 0.0)

    def __call__(self, starting: Starting) -> None:
        what, sent_s = self._last
        now_s = time.monotonic()
        complete = 0 < starting.num_bytes == starting.bytes_read
        if starting.what != what or complete or now_s - sent_s >= self._interval_s:
            self._last = (starting.what, now_s)
            self._send(starting)


def describe_start(by_rank: Mapping[int, Starting], rank: int) -> str:
    """The progress line after a report of `rank`: the bytes read by all ranks while any loads, else this report."""
    bytes_read = sum(starting.bytes_read for starting in by_rank.values())
    num_bytes = sum(starting.num_bytes for starting in by_rank.values())
    if num_bytes:
        return str(Starting(what=LOADING, bytes_read=bytes_read, num_bytes=num_bytes))
    return str(by_rank[rank])


class ToWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the messages to a worker."""

    wave: int


class AllLoaded(ToWorker, frozen=True, kw_only=True, tag=True):
    """Every rank has sent `Loaded`. Sent once, before any other message."""


class Work(ToWorker, frozen=True, kw_only=True, tag=True):
    """Requests to start and ids to forget. Empty for a rank that only takes part in the steps of the others."""

    requests: list[Request] = []
    abort: list[int] = []


class Reconfigure(ToWorker, frozen=True, kw_only=True, tag=True):
    """Changes the policy; sent only while no request is open. Answered by `Answer`."""

    policy: OverlapPolicy


class Ask(ToWorker, frozen=True, kw_only=True, tag=True):
    """Asks for the statistics, or for the timelines of the last steps. Answered by `Answer`."""

    timeline: bool = False


class Stop(ToWorker, frozen=True, kw_only=True, tag=True):
    """Tells the worker to forget all requests and to exit once all ranks have seen this."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank has its weights and waits for `AllLoaded` before its next exchange with its peers.

    Ranks load at different speeds, and loading a large model can take longer than the time limit of an exchange.
    """


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank is ready for requests. The fields are the same on all ranks, but for time and bytes of `captured`."""

    device_name: str
    transport_name: str
    data_path: DataPath
    cache: CacheSize
    captured: CaptureReport
    attention: str = ""  # the attention backend and the reason


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The outputs of a step of this rank. An empty message only shows that steps go on."""

    outputs: list[TokenOutput]


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answers the `Ask` or `Reconfigure` of this wave."""

    wave: int
    stats: dict[str, Any] = {}
    timeline: list[StepTimeline] = []


class Warned(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A warning that was logged on the rank. The frontend logs it once, however many ranks send it."""

    logger: str
    text: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank is about to exit because of an error.

    kind: the class of the error. fields: those of an `AntiphonError`, to rebuild it. traceback: for the log.
    """

    kind: str
    message: str
    traceback: str
    fields: dict[str, Any] = {}  # msgspec copies it


FromWorker = Starting | Loaded | Ready | Tokens | Answer | Warned | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(AllLoaded | Work | Reconfigure | Ask | Stop).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode


def keep_all(socket: zmq.Socket[bytes]) -> None:
    """Lift the limit of 1000 queued messages, beyond which a ROUTER socket drops. Call before bind or connect."""
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
