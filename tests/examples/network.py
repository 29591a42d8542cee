"""Two network namespaces of this machine, joined by a virtual cable: to the network they are two hosts.

Each has `lo` and one interface, and no route to anywhere else, so nothing that runs there reaches other machines.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class NoNamespacesError(Exception):
    """This machine does not allow this user to make network namespaces."""


@dataclass(frozen=True, slots=True)
class Host:
    namespace: str
    interface: str

    def command(self, words: list[str]) -> list[str]:
        """Return the command that runs `words` on this host."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def bytes_sent(self) -> int:
        """Return the bytes sent over its interface since it was made."""
        printed = _ip("-n", self.namespace, "-s", "-j", "link", "show", "dev", self.interface)
        return int(json.loads(printed)[0]["stats64"]["tx"]["bytes"])


@contextmanager
def two_hosts(addresses: tuple[str, str], interface: str) -> Iterator[tuple[Host, Host]]:
    """Make two hosts, each with an interface of this name. Raises `NoNamespacesError` if the system refuses."""
    hosts = tuple(Host(f"antiphon-{os.getpid()}-{place}", interface) for place in range(2))
    first, second = hosts
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            made.append(host)
        cable = ["link", "add", interface, "netns", first.namespace, "type", "veth"]
        _ip(*cable, "peer", "name", interface, "netns", second.namespace)
        for host, address in zip(hosts, addresses, strict=True):
            _ip("-n", host.namespace, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in made:
            _ip("netns", "delete", host.namespace)  # with its end of the cable, and so the cable


def _ip(*words: str) -> str:
    try:
        ended = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError as error:
        raise NoNamespacesError("there is no program `ip` (iproute2)") from error
    if ended.returncode:
        raise NoNamespacesError(f"ip {' '.join(words)}: {ended.stderr.strip()}")
    return ended.stdout
