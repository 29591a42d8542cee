"""The messages between the frontend and the workers: msgpack over ZeroMQ.

Every message to the workers carries a wave, a number that grows by one with each and is the same for all ranks. The
ranks put the newest wave they have seen into their agreement row; they stop stepping only when nobody has work and
all have seen the same wave, so no rank can sleep through a message that another one acts on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import msgspec
import zmq

from antiphon.comm import DataPath
from antiphon.config.cache import CacheSize
from antiphon.core.policy import OverlapPolicy
from antiphon.core.sampling import ResolvedParams
from antiphon.engine.scheduling.request import Request, TokenOutput
from antiphon.timeline import StepTimeline

LOADING = "loading the model"


class Starting(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What this rank is doing while it starts, and how many of the bytes it needs it has read."""

    what: str
    bytes_read: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        if not self.num_bytes:
            return self.what
        size = f"{self.num_bytes / 1e9:.1f} GB" if self.num_bytes >= 1e9 else f"{self.num_bytes / 1e6:.1f} MB"
        return f"{self.what}: {self.bytes_read / self.num_bytes:.0%} of {size}"


class Throttle:
    """Passes on the first and the last report of each stage, and one every `interval_s` in between."""

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
    """One line after a report of `rank`: the bytes of all ranks that are loading, or else what this one is doing."""
    loading = [said for said in by_rank.values() if said.num_bytes]
    if loading:
        done, total = sum(said.bytes_read for said in loading), sum(said.num_bytes for said in loading)
        return str(Starting(what=LOADING, bytes_read=done, num_bytes=total))
    return str(by_rank[rank])


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request; see `antiphon.engine.scheduling.request.Request`."""

    request_id: int
    prompt_ids: tuple[int, ...]
    params: dict[str, Any]
    max_tokens: int
    seed: int

    @staticmethod
    def of(request: Request) -> NewRequest:
        return NewRequest(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            params=asdict(request.params),
            max_tokens=request.max_tokens,
            seed=request.seed,
        )

    def to_request(self) -> Request:
        return Request(
            request_id=self.request_id,
            prompt_ids=self.prompt_ids,
            params=ResolvedParams(**self.params),
            max_tokens=self.max_tokens,
            seed=self.seed,
        )


class ToWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the messages to a worker."""

    wave: int


class AllLoaded(ToWorker, frozen=True, kw_only=True, tag=True):
    """Every rank has sent `Loaded`. This is the first message, sent once."""


class Work(ToWorker, frozen=True, kw_only=True, tag=True):
    """Requests to start and to forget; empty for a rank that only has to take part."""

    requests: list[NewRequest] = []
    abort: list[int] = []


class Reconfigure(ToWorker, frozen=True, kw_only=True, tag=True):
    """A new policy, sent only while no request is open. Answered by `Answer`."""

    policy: OverlapPolicy


class Ask(ToWorker, frozen=True, kw_only=True, tag=True):
    """A question, answered by `Answer` with the statistics or the last steps."""

    timeline: bool = False


class Stop(ToWorker, frozen=True, kw_only=True, tag=True):
    """Forget all requests, and end the process as soon as all ranks have seen this."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank has its weights, and waits for `AllLoaded` before it needs its peers.

    Ranks load at different speeds, and a large model takes longer than a peer may make another one wait.
    """


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank has loaded its model. The fields are the same on all ranks."""

    device_name: str
    transport_name: str
    data_path: DataPath
    cache: CacheSize


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a step has generated on this rank. An empty message only says that steps go on."""

    outputs: list[TokenOutput]


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to the `Ask` or `Reconfigure` of this wave."""

    wave: int
    stats: dict[str, Any] = {}
    timeline: list[StepTimeline] = []


class Warned(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A warning that was logged on the rank. The frontend logs it once, even if other ranks send it too."""

    logger: str
    text: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank is about to exit.

    kind: the class of the error. fields: those of an `AntiphonError`, to make it anew. traceback: for the log.
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
    """Lift the socket's limit of 1000 queued messages, beyond which a ROUTER drops. Call it before bind or connect."""
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
