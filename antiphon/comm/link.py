"""The link model of the `simulated` transport: bandwidth and latency, one full-duplex link a rank."""

from __future__ import annotations

import re
from dataclasses import dataclass

from antiphon.core.errors import OptionError

_BANDWIDTH_UNITS = {"KB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9}
_LATENCY_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link that carries one communication after the other."""

    bytes_per_s: float = 1e9
    latency_s: float = 100e-6

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e6:.4g} MB/s, {self.latency_s * 1e6:.4g} us"

    def duration_s(self, num_bytes: int, num_messages: int) -> float:
        """Time that a communication takes on an idle link."""
        return num_messages * self.latency_s + num_bytes / self.bytes_per_s


def parse_link(bandwidth: str | None, latency: str | None) -> Link:
    """`200MB/s` and `1ms`, each optional. Raises `OptionError` naming the units."""
    default = Link()
    return Link(
        bytes_per_s=default.bytes_per_s if bandwidth is None else _number(bandwidth, _BANDWIDTH_UNITS, "bandwidth"),
        latency_s=default.latency_s if latency is None else _number(latency, _LATENCY_UNITS, "latency"),
    )


def _number(text: str, units: dict[str, float], what: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([A-Za-z/]+)", text.strip())
    if match is None or match[2] not in units or (what == "bandwidth" and float(match[1]) == 0):
        raise OptionError(
            f"{what} {text!r} of the simulated link is not a number with a unit; use {', '.join(units)}, "
            f"such as {'200MB/s' if what == 'bandwidth' else '1ms'}"
        )
    return float(match[1]) * units[match[2]]
