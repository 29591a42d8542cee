"""One server that most tests ask: two ranks, overlap on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.server import ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--ranks", "2", "--dbo", "on", "--max-queue", "256") as started:
        yield started
