"""The contract of all transports, and what they share.

    dispatch   sends each token to the ranks that hold its experts
    combine    brings the partial sums home and adds them

The contract, which the tests check for every implementation:

- Lanes: each lane has its own buffers, and a call belongs to the running lane. Lanes may be in different phases.
- Order: on a lane, dispatch and combine alternate, each finished before the next. All ranks, including those without
  tokens, call them in the same order over all lanes together.
- Sources: `x_TD` is read before `dispatch` returns, or on a stream that waits for the compute stream's work so far.
- Results: `Rows` belong to the transport and are valid until their combine is sent. The result of `combine` [T, D] is
  new and belongs to the caller. Both are safe to use on the compute stream once finished.
- Captured steps: a transport without a `capture_obstacle` queues the same operations on the same addresses whenever
  `tokens_by_rank` is the same, and never needs the host in between. Such a step is captured once and replayed.
- Path: `through_host` says whether data goes through host memory even where devices can access each other.
- Sums: the caller adds over the experts of one rank, in float32 at least; the transport defines how it adds over ranks.

Shapes: `T` tokens of this rank, `D` hidden size, `K` experts per token, `R` rows received, `W` ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Generic, NotRequired, TypedDict, TypeVar

import torch

from antiphon.comm.group import RankGroup
from antiphon.comm.needs import Refusal, Way, World
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.core.errors import LaneError, OptionError
from antiphon.machine.facts import Facts
from antiphon.runtime import Pending, Streams, current_lane

T = TypeVar("T")
U = TypeVar("U")

_SAYS_NOTHING_OF_CAPTURE = "its class does not say that it can be captured"

DEFAULT_MAX_TOKENS = 8192
"""Default for the maximum number of tokens per lane and rank."""


@dataclass(slots=True, kw_only=True)
class Flight(Generic[T]):
    """A communication in flight, as an implementation returns it. The fields are those of `Pending`.

    A late launch sets `num_bytes` and `num_messages` if they are unknown before it.
    """

    wait: Callable[[], T]
    launch: Callable[[], None] | None = None
    ready_ns: Callable[[], int | None] | None = None
    num_bytes: int = 0
    num_messages: int = 1

    def then(self, result: Callable[[T], U], *, launched: Callable[[], None] | None = None) -> Flight[U]:
        """The same flight with its result mapped by `result`. launched: called after a late launch."""

        def launch() -> None:
            assert self.launch is not None
            self.launch()
            made.num_bytes, made.num_messages = self.num_bytes, self.num_messages
            if launched is not None:
                launched()

        made = Flight(
            wait=lambda: result(self.wait()),
            launch=None if self.launch is None else launch,
            ready_ns=self.ready_ns,
            num_bytes=self.num_bytes,
            num_messages=self.num_messages,
        )
        return made


class MadeFor(TypedDict):
    """The keyword arguments of `Transport`, for subclasses and wrappers that pass them on."""

    group: RankGroup
    streams: Streams
    num_lanes: int
    max_tokens: NotRequired[int]


class DataPath(Enum):
    """How a transport's data gets from one rank's device to another's."""

    NONE = "none"  # one rank: nothing is sent
    PEERS = "peers"  # directly into a peer's memory, by peer access over NVLink or PCIe
    HOST = "host"  # through host memory; always on CPUs
    SIMULATED = "simulated"  # over a simulated link


class _Phase(Enum):
    IDLE = "idle"
    DISPATCHING = "dispatching"
    RECEIVED = "received"
    COMBINING = "combining"


class Transport(ABC):
    """Dispatch and combine. Implementations fill in `send_tokens` and `send_partials`."""

    name: ClassVar[str]
    num_sms: int = 0  # SMs that computation should leave to the transport's kernels; 0 if unknown or none
    through_host: ClassVar[bool] = False  # data goes through host memory even where devices can access each other
    peers_reach: bool = False  # whether all devices may and can access each other's memory; set by `create_transport`

    capture_obstacle: ClassVar[str] = _SAYS_NOTHING_OF_CAPTURE
    """Why a step over this transport cannot be captured; "" if it can, on a device that is `capturable` and with the
    same number of tokens on every rank. Not inherited: a subclass may do what cannot be captured."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "capture_obstacle" not in vars(cls):
            cls.capture_obstacle = _SAYS_NOTHING_OF_CAPTURE

    def __init__(
        self,
        shape: ExpertShape,
        *,
        group: RankGroup,
        streams: Streams,
        num_lanes: int,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        self.shape = shape
        self.group = group
        self.streams = streams
        self.num_lanes = num_lanes
        self.max_tokens = max_tokens
        self.experts_per_rank = shape.experts_per_rank(group.size)
        self._phases = [_Phase.IDLE] * num_lanes
        self._num_rows = [0] * num_lanes  # of the last dispatch

    @property
    def made_for(self) -> MadeFor:
        """The arguments for making another transport like this one, or a wrapper around it."""
        return {
            "group": self.group,
            "streams": self.streams,
            "num_lanes": self.num_lanes,
            "max_tokens": self.max_tokens,
        }

    @classmethod
    def refusal(cls, facts: Facts | None, shape: ExpertShape, world: World) -> Refusal | None:
        """Why this transport cannot serve `world` with experts of `shape`; `None` if it can.

        facts: what is known about the machine; `None` before it has been examined, when only the request is checked.
        """
        return None

    @classmethod
    def way(cls, facts: Facts, shape: ExpertShape, world: World) -> Way:
        """How the data would travel in a world that `refusal` accepts."""
        return Way("")

    @property
    def capturable(self) -> bool:
        """Whether a step over this transport can be captured; see `capture_obstacle`."""
        return not self.capture_obstacle

    @property
    def data_path(self) -> DataPath:
        """How the data travels; the same on all ranks."""
        if self.group.size == 1:
            return DataPath.NONE
        return DataPath.PEERS if self.peers_reach and not self.through_host else DataPath.HOST

    def __repr__(self) -> str:
        group, shape = self.group, self.shape
        experts = f"{self.experts_per_rank} of {shape.num_experts} experts"
        lanes = f"{self.num_lanes} lanes of {self.max_tokens} tokens"
        return f"{self.name} on rank {group.rank} of {group.size} ({self.streams.device}): {experts}, {lanes}"

    def dispatch(
        self,
        x_TD: torch.Tensor,
        routes: Routes,
        *,
        tokens_by_rank: tuple[int, ...] | None = None,
        label: str = "",
    ) -> Pending[Rows]:
        """Send each token to the ranks of its experts.

        x_TD: [T, D] in the shape's dtype; T may be 0.
        tokens_by_rank: T of every rank, if the caller knows it as an engine does, which saves some transports an
            exchange of counts. The same tuple on all ranks, or `None` on all.
        label: the place in the model, such as "layer 3", for recordings and errors.

        Raises `LaneError` if called out of order, and `OptionError` for tensors that do not fit the shape or that
        require a gradient, and for a capture of what cannot be replayed.
        """
        self._check(x_TD, routes)
        if tokens_by_rank is not None:
            tokens_by_rank = self._checked_counts(tokens_by_rank, x_TD.shape[0])
        if self.streams.capturing:
            self._check_capture(tokens_by_rank)
        lane = self._lane_in(_Phase.IDLE, "dispatch")
        label = f"dispatch {label}".rstrip()
        flight = self.send_tokens(lane, x_TD, routes, tokens_by_rank, label)
        self._phases[lane] = _Phase.DISPATCHING

        def received(rows: Rows) -> None:
            self._phases[lane] = _Phase.RECEIVED
            self._num_rows[lane] = rows.x_RD.shape[0]

        return _pending(flight, label, received)

    def combine(self, partial_RD: torch.Tensor, *, label: str = "") -> Pending[torch.Tensor]:
        """Send the partial sums of the last received rows back to their owners. The result is [T, D], in token order.

        partial_RD: [R, D] in the shape's dtype, rows in the order of `Rows`. Raises the same errors as `dispatch`.
        """
        lane = self._lane_in(_Phase.RECEIVED, "combine")
        expected = (self._num_rows[lane], self.shape.hidden_size)
        if partial_RD.shape != expected or partial_RD.dtype != self.shape.dtype:
            raise OptionError(
                f"partial sums are {list(partial_RD.shape)} {partial_RD.dtype}",
                limit=f"the rows received need {list(expected)} {self.shape.dtype}",
                option="partial_RD",
            )
        _check_forward_only(partial_RD)
        label = f"combine {label}".rstrip()
        flight = self.send_partials(lane, partial_RD, label)
        self._phases[lane] = _Phase.COMBINING

        def came_home(_: torch.Tensor) -> None:
            self._phases[lane] = _Phase.IDLE

        return _pending(flight, label, came_home)

    def reset(self) -> None:
        """Return all lanes to idle after a failed run.

        Safe only if nothing is in flight: with one rank, or if every rank failed after the same call. If one rank
        failed alone, its peers are in the middle of an exchange and the group must end.
        """
        self._phases = [_Phase.IDLE] * self.num_lanes

    def freeze(self) -> None:  # noqa: B027 (a default, not a gap)
        """Keep all buffers where they are from now on, because captured steps hold their addresses.

        An exchange that needs a larger buffer then raises `OptionError`. By default nothing happens: no buffer grows.
        """

    def before_replay(self) -> None:  # noqa: B027 (a default, not a gap)
        """Tell the device watch that a captured step is about to be replayed. Call it before each replay.

        It queues a word on the compute stream, and the host does not wait. By default nothing happens: no device waits
        for a peer.
        """

    @abstractmethod
    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        """Start a dispatch on `lane`."""

    @abstractmethod
    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        """Start the combine that answers the last dispatch on `lane`."""

    def rows(
        self,
        x_RD: torch.Tensor,
        global_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
        out_RD: torch.Tensor | None = None,
    ) -> Rows:
        """`Rows` for this rank's experts."""
        num_experts = self.experts_per_rank
        return Rows(
            x_RD,
            global_ids_RK,
            weights_RK,
            out_RD,
            first_expert=self.group.rank * num_experts,
            num_experts=num_experts,
        )

    def _lane_in(self, phase: _Phase, verb: str) -> int:
        lane = current_lane()
        if lane >= self.num_lanes:
            raise LaneError(
                f"lane {lane} is out of range",
                limit=f"this transport was made for {self.num_lanes} lanes",
                remedy=f"make it with num_lanes={lane + 1} or more",
                option="num_lanes",
                value=self.num_lanes,
            )
        if self._phases[lane] is not phase:
            raise LaneError(
                f"{verb} on lane {lane} while it is {self._phases[lane].value}",
                limit="dispatch and combine alternate",
                remedy="finish each before the next",
            )
        return lane

    def _check(self, x_TD: torch.Tensor, routes: Routes) -> None:
        shape = self.shape
        if x_TD.dim() != 2 or x_TD.shape[1] != shape.hidden_size or x_TD.dtype != shape.dtype:
            raise OptionError(
                f"tokens are {list(x_TD.shape)} {x_TD.dtype}",
                limit=f"this transport takes [T, {shape.hidden_size}] {shape.dtype}",
                option="x_TD",
            )
        if x_TD.shape[0] > self.max_tokens:
            raise OptionError(
                f"{x_TD.shape[0]} tokens are too many",
                limit=f"this transport was made for max_tokens={self.max_tokens}",
                remedy="make it for more",
                option="max_tokens",
                value=self.max_tokens,
            )
        _check_forward_only(x_TD, routes.weights_TK)
        places = {tensor.device for tensor in (x_TD, routes.ids_TK, routes.weights_TK)}
        if places != {self.streams.device}:
            found = f"{x_TD.device}, ids on {routes.ids_TK.device}, weights on {routes.weights_TK.device}"
            raise OptionError(
                f"tokens are on {found}",
                limit=f"this transport takes all three on {self.streams.device}",
                remedy=f"move them to {self.streams.device}",
                option="x_TD",
            )
        expected = (x_TD.shape[0], shape.top_k)
        if routes.ids_TK.shape != expected or routes.weights_TK.shape != expected:
            raise OptionError(
                f"routes are {list(routes.ids_TK.shape)} and {list(routes.weights_TK.shape)}",
                limit=f"{x_TD.shape[0]} tokens with {shape.top_k} experts each need {list(expected)}",
                option="routes",
            )
        if routes.ids_TK.is_cpu and routes.ids_TK.numel():  # elsewhere the host would have to wait
            low, high = (int(bound) for bound in routes.ids_TK.aminmax())
            if low < -1 or high >= shape.num_experts:
                raise OptionError(
                    f"expert ids run from {low} to {high}",
                    remedy=f"use 0 to {shape.num_experts - 1}, and -1 for rows that are padding",
                    option="routes",
                )

    def _check_capture(self, tokens_by_rank: tuple[int, ...] | None) -> None:
        """Refuse a capture whose replays would not do what is expected of them."""
        if self.capture_obstacle:
            raise OptionError(
                f"a step over transport {self.name!r} cannot be captured",
                limit=self.capture_obstacle,
                remedy="run it eagerly",
                option="transport",
                value=self.name,
            )
        if tokens_by_rank is None or len(set(tokens_by_rank)) != 1:
            raise OptionError(
                f"a step with tokens_by_rank={tokens_by_rank} cannot be captured",
                limit="its replays send the same number of tokens from every rank",
                remedy="pad all ranks to one size",
                option="tokens_by_rank",
                value=tokens_by_rank,
            )

    def _checked_counts(self, tokens_by_rank: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        counts = tuple(tokens_by_rank)
        rank, size = self.group.rank, self.group.size
        if len(counts) != size or counts[rank] != num_tokens or not 0 <= min(counts) <= max(counts) <= self.max_tokens:
            raise OptionError(
                f"tokens_by_rank={counts} does not fit",
                limit=f"{size} ranks; rank {rank} sends {num_tokens} tokens, and none may send over {self.max_tokens}",
                remedy="pass the same counts on all ranks",
                option="tokens_by_rank",
                value=counts,
            )
        return counts


def _check_forward_only(*tensors: torch.Tensor) -> None:
    """Refuse gradients: the buffers outlive the call, and so would an autograd graph that holds them."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise OptionError(
            "a tensor requires a gradient",
            limit="transports are forward only",
            remedy="run under torch.no_grad() or torch.inference_mode(), entered outside run_lanes",
        )


def _pending(flight: Flight[T], label: str, arrived: Callable[[T], None]) -> Pending[T]:
    """Wrap the flight in a pending that calls `arrived` with its result."""

    def launch() -> None:
        assert flight.launch is not None
        flight.launch()
        pending.num_bytes, pending.num_messages = flight.num_bytes, flight.num_messages

    def wait() -> T:
        result = flight.wait()
        arrived(result)
        return result

    pending = Pending(
        wait,
        label=label,
        launch=None if flight.launch is None else launch,
        ready_ns=flight.ready_ns,
        num_bytes=flight.num_bytes,
        num_messages=flight.num_messages,
    )
    return pending
