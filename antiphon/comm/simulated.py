"""`simulated`: wraps another transport and delays completion according to a link model, without using the CPU.

The wrapped transport moves the data. A communication has arrived once that is done and the modelled link, which carries
this rank's communications one after another, has had its time. Waiting is a sleep, so the other lane computes at full
speed. It is meant for CPUs: with a GPU it would block the host, which queues for all lanes. Results measured with it
are always labeled simulated.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TypeVar

import torch

from antiphon.comm.tokens import Routes, Rows
from antiphon.comm.transport import DataPath, Flight, Transport
from antiphon.core.errors import OptionError

_BANDWIDTH_UNITS = {"KB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9}
_LATENCY_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link that carries one communication at a time."""

    bytes_per_s: float = 1e9
    latency_s: float = 100e-6

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e6:.4g} MB/s, {self.latency_s * 1e6:.4g} us"

    def duration_s(self, num_bytes: int, num_messages: int) -> float:
        """Time that a communication takes on an otherwise idle link."""
        return num_messages * self.latency_s + num_bytes / self.bytes_per_s


def parse_link(bandwidth: str | None, latency: str | None) -> Link:
    """Parse `200MB/s` and `1ms`, each optional. Raises `OptionError` that names the units."""
    default = Link()
    return Link(
        bytes_per_s=default.bytes_per_s if bandwidth is None else _number(bandwidth, _BANDWIDTH_UNITS, "bandwidth"),
        latency_s=default.latency_s if latency is None else _number(latency, _LATENCY_UNITS, "latency"),
    )


def _number(text: str, units: dict[str, float], what: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([A-Za-z/]+)", text.strip())
    if match is None or match[2] not in units or (what == "bandwidth" and float(match[1]) == 0):
        raise OptionError(
            f"{what}={text!r} of a simulated link is not a number with a unit",
            limit=f"the units are {', '.join(units)}",
            remedy=f"write something like {'200MB/s' if what == 'bandwidth' else '1ms'}",
            option=what,
            value=text,
        )
    return float(match[1]) * units[match[2]]


T = TypeVar("T")


class SimulatedTransport(Transport):
    """`inner` over a slower link."""

    name = "simulated"
    capture_obstacle = "the host sleeps for as long as the simulated link is busy"

    def __init__(self, inner: Transport, link: Link) -> None:
        super().__init__(inner.shape, **inner.made_for)
        self.inner = inner
        self.link = link
        self._busy_until_ns = 0

    @property
    def data_path(self) -> DataPath:
        return DataPath.NONE if self.group.size == 1 else DataPath.SIMULATED

    def reset(self) -> None:
        super().reset()
        self.inner.reset()
        self._busy_until_ns = 0

    def send_tokens(
        self, lane: int, x_TD: torch.Tensor, routes: Routes, tokens_by_rank: tuple[int, ...] | None, label: str
    ) -> Flight[Rows]:
        return self._delayed(self.inner.send_tokens(lane, x_TD, routes, tokens_by_rank, label))

    def send_partials(self, lane: int, partial_RD: torch.Tensor, label: str) -> Flight[torch.Tensor]:
        return self._delayed(self.inner.send_partials(lane, partial_RD, label))

    def _delayed(self, flight: Flight[T]) -> Flight[T]:
        arrival_ns = 0

        def occupy_link() -> None:
            nonlocal arrival_ns
            start_ns = max(time.perf_counter_ns(), self._busy_until_ns)
            self._busy_until_ns = start_ns + int(self.link.duration_s(flight.num_bytes, 0) * 1e9)
            arrival_ns = self._busy_until_ns + int(self.link.duration_s(0, flight.num_messages) * 1e9)

        def arrive(result: T) -> T:
            while (left_ns := arrival_ns - time.perf_counter_ns()) > 0:
                time.sleep(left_ns * 1e-9)
            return result

        def ready_ns() -> int | None:
            inner_ns = flight.ready_ns() if flight.ready_ns is not None else None
            return arrival_ns if inner_ns is None else max(arrival_ns, inner_ns)

        if flight.launch is None:
            occupy_link()
        delayed = flight.then(arrive, launched=occupy_link)
        delayed.ready_ns = ready_ns
        return delayed
