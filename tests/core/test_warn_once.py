"""A slow path is said once a process, with its cost and its remedy."""

from __future__ import annotations

import pytest

from antiphon.core.warn_once import warn_once


def test_every_fact_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    for _ in range(3):
        warn_once("100% of it is slow", cost="it takes 2 s", remedy="use another one")
        warn_once("the rest is slow too", cost="it takes 3 s", remedy="wait")
    assert caplog.messages == [
        "100% of it is slow: it takes 2 s; use another one",
        "the rest is slow too: it takes 3 s; wait",
    ]
    assert {(record.name, record.levelname) for record in caplog.records} == {("antiphon", "WARNING")}
